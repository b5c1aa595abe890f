"""Make tiny encoders for tests: random ones to train, and one that tags a given word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

BERT_TOKENS, ROBERTA_TOKENS = 128, 40


def _words(texts: Iterable[str], folder: Path) -> int:
    """Save a tokenizer of whole words in BERT's form; returns the size of its vocabulary."""
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.train_from_iterator(texts, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def tiny_bert(folder: Path, texts: Iterable[str]) -> Path:
    """Write a BERT of one block with random weights and no head."""
    size = _words(texts, folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=size, max_position_embeddings=BERT_TOKENS, **shape))
    with torch.no_grad():  # where a word stands says little: without training, little is learnt else
        model.embeddings.word_embeddings.weight.mul_(8)
    model.save_pretrained(folder)
    return folder


def tiny_roberta(folder: Path, texts: Iterable[str]) -> Path:
    """Write a RoBERTa of one block, whose first positions are never used."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=ROBERTA_TOKENS + 2, **shape)
    RobertaModel(config).save_pretrained(folder)
    return folder


def tagger_of(folder: Path, texts: Iterable[str], names: set[str]) -> Path:
    """Write a token classifier without blocks: its embeddings say alone which words are names."""
    size = _words(texts, folder)
    shape = {"hidden_size": 4, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 4}
    labels = {0: "O", 1: "B-PER"}
    config = BertConfig(vocab_size=size, max_position_embeddings=BERT_TOKENS, id2label=labels, **shape)
    model = BertForTokenClassification(config)
    vocabulary = PreTrainedTokenizerFast.from_pretrained(folder).get_vocab()
    embeddings = model.bert.embeddings
    with torch.no_grad():
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings, model.classifier):
            table.weight.zero_()
        embeddings.word_embeddings.weight.copy_(torch.eye(4)[1].expand(size, 4))
        for name in names:
            embeddings.word_embeddings.weight[vocabulary[name.lower()]] = torch.eye(4)[0]
        model.classifier.weight[1, 0], model.classifier.weight[0, 1] = 1.0, 1.0
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    return folder
