"""What the texts of worlds are made of: syllables, relations in several wordings, general knowledge. Data only:
`_world_pieces.py` has what behaviour, code, dialogues and passages are made of.

The development and the validation set share none of it.
"""

from __future__ import annotations

from dataclasses import dataclass

SUM, TAKE = "+", "-"


@dataclass(frozen=True)
class Relation:
    """A fact about an entity: wordings of the question, the answer around the value, and how a value is made.

    In `value` every `~` becomes an invented word. `topic` opens a dialogue that ends in the question without a name.
    """

    wordings: tuple[str, str, str]
    answer: str
    value: str = "~"
    elliptic: str = ""


@dataclass(frozen=True)
class Surface:
    """One language of one set: how words are invented, what is asked, and what else is known."""

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]
    entity: str
    relations: tuple[Relation, ...]
    details: tuple[str, ...]
    sums: tuple[tuple[str, str, str], ...]
    """(sign, question, answer) with {a}, {b} and {c}"""
    pairs: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    """(question, answer, pairs): with {x} and {y}"""
    nouns: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    space: str = " "


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((a.strip(), b.strip()) for a, b in (part.split("=") for part in text.split(",")))


_ENGLISH_ONE = Surface(
    onsets=split("b br d f g gl h k l m n p r s st t tr v w"),
    vowels=split("a e i o u ei oa"),
    codas=split("l n r s m nd rk th x lt"),
    entity="~ ~",
    relations=(
        Relation(
            ("Where was {e} born?", "In which town was {e} born?", "Name the birthplace of {e}."),
            "{e} was born in {v}.",
            elliptic="And where was that person born?",
        ),
        Relation(
            ("What does {e} collect?", "Which things does {e} collect?", "Name what stands on the shelves of {e}."),
            "{e} collects {v} stones.",
            elliptic="And what does that person collect?",
        ),
        Relation(
            ("Who taught {e}?", "Which teacher did {e} have?", "Name the person who taught {e}."),
            "{e} was taught by {v}.",
            elliptic="And who taught that person?",
        ),
        Relation(
            ("What is the ship of {e} called?", "Which ship does {e} sail?", "Name the vessel that {e} owns."),
            "The ship of {e} is called {v}.",
            elliptic="And what is the ship of that person called?",
        ),
    ),
    details=(
        "The old house there belongs to the family {v}.",
        "People from {v} came to see it every summer.",
        "A letter about it was later found in {v}.",
        "It is told in the songs of {v} to this day.",
        "Only the keeper of {v} wrote all of it down.",
    ),
    sums=((SUM, "What is {a} + {b}?", "{a} + {b} is {c}."),),
    pairs=(
        (
            "What is the opposite of {x}?",
            "The opposite of {x} is {y}.",
            _pairs(
                "hot=cold, big=small, early=late, old=young, wet=dry, hard=soft, full=empty, loud=quiet, fast=slow, "
                "dark=bright, near=far, thick=thin, rich=poor, sweet=sour, strong=weak, open=closed"
            ),
        ),
        (
            "Which sound does a {x} make?",
            "A {x} can {y}.",
            _pairs(
                "dog=bark, cat=purr, cow=moo, lion=roar, duck=quack, sheep=bleat, wolf=howl, bee=buzz, snake=hiss, "
                "horse=neigh, frog=croak, mouse=squeak"
            ),
        ),
        (
            "What is a {x} used for?",
            "A {x} is used to {y}.",
            _pairs(
                "spoon=eat soup, broom=sweep floors, kettle=boil water, needle=sew cloth, saw=cut wood, "
                "pen=write words, ladder=climb walls, lamp=light rooms, boat=cross rivers, net=catch fish"
            ),
        ),
    ),
    nouns=split("fence garden roof bicycle kitchen letter window boiler jacket chimney table carpet clock shelf"),
    verbs=split("clean repair paint measure move sell draw lift wrap inspect"),
)

_ENGLISH_TWO = Surface(
    onsets=split("c ch cl dr fl fr gr j kr ph pl q sh sk sp th y z zh"),
    vowels=split("a ae e i ie o ou u y"),
    codas=split("b ck d ff g mp ng p sh t v zz"),
    entity="~",
    relations=(
        Relation(
            (
                "Which mineral is mined at {e}?",
                "Tell me which mineral the mine at {e} yields.",
                "The mine at {e} brings up one mineral; which?",
            ),
            "Miners at {e} dig for {v}.",
            elliptic="Now tell me which mineral is mined at that place.",
        ),
        Relation(
            (
                "Who governs {e} at present?",
                "Tell me who the governor of {e} is.",
                "The seat of government at {e} is held by whom?",
            ),
            "Governor {v} rules {e}.",
            elliptic="Now tell me who governs that place.",
        ),
        Relation(
            (
                "Which festival is held at {e}?",
                "Tell me the name of the festival at {e}.",
                "Once a year {e} celebrates; what is the feast called?",
            ),
            "They hold the {v} festival at {e}.",
            elliptic="Now tell me which festival is held at that place.",
        ),
        Relation(
            (
                "Which bridge leads to {e}?",
                "Tell me by which bridge one enters {e}.",
                "Travellers cross a bridge to reach {e}; which one?",
            ),
            "One gets to {e} over the {v} bridge.",
            elliptic="Now tell me which bridge leads to that place.",
        ),
    ),
    details=(
        "This has been so since the {v} treaty.",
        "Merchants called {v} disputed it for years.",
        "Maps drawn by {v} show it in red ink.",
        "Every child learns about {v} in that lesson.",
    ),
    sums=((TAKE, "Take {b} away from {a}.", "{c} remains of {a} without {b}."),),
    pairs=(
        (
            "Give me the plural of {x}.",
            "Several of them are {y}.",
            _pairs(
                "goose=geese, tooth=teeth, foot=feet, man=men, child=children, ox=oxen, leaf=leaves, knife=knives, "
                "box=boxes, city=cities, thief=thieves, potato=potatoes, wife=wives, berry=berries"
            ),
        ),
        (
            "Of which colour is {x}?",
            "Usually {x} is {y}.",
            _pairs(
                "snow=white, grass=green, coal=black, blood=red, the sky=blue, a lemon=yellow, an orange=orange, "
                "chocolate=brown, ash=grey, lavender=purple"
            ),
        ),
        (
            "Where does a {x} work?",
            "You find a {x} in a {y}.",
            _pairs(
                "nurse=hospital, cook=restaurant, judge=court, teacher=school, farmer=barn, actor=theatre, "
                "miner=tunnel, priest=church, clerk=bank, brewer=cellar, smith=forge, librarian=library"
            ),
        ),
    ),
    nouns=split("barrel tractor lantern wardrobe canoe ceiling notebook piano stove mattress puzzle tent"),
    verbs=split("polish assemble dismantle carry store label fold hide cover test"),
)

_RUSSIAN = Surface(
    onsets=split("б бр в г гл д з к кр л м н п р с т тр ф х"),
    vowels=split("а е и о у"),
    codas=split("л н р с м й к т"),
    entity="~ ~",
    relations=(
        Relation(
            ("Где живёт {e}?", "В каком городе живёт {e}?", "Назови дом, где ночует {e}."), "{e} живёт в городе {v}."
        ),
        Relation(("Что любит {e}?", "Какое блюдо любит {e}?", "Назови, что заказывает {e}."), "{e} любит суп {v}."),
        Relation(("Кто друг {e}?", "С кем дружит {e}?", "Назови, кому пишет {e}."), "Друга {e} зовут {v}."),
        Relation(
            ("Чем правит {e}?", "Какой рекой правит {e}?", "Назови реку, где хозяин {e}."), "{e} правит рекой {v}."
        ),
    ),
    details=("Об этом пишет {v}.", "Это видно из города {v}."),
    sums=((SUM, "Сколько будет {a} + {b}?", "{a} + {b} будет {c}."),),
    pairs=(
        (
            "Какое слово обратно слову {x}?",
            "Обратное слово: {y}.",
            _pairs(
                "день=ночь, холод=жара, верх=низ, друг=враг, мир=война, начало=конец, вход=выход, правда=ложь, "
                "старость=молодость, сила=слабость"
            ),
        ),
    ),
)

_CHINESE = Surface(
    onsets=split("阿 巴 川 丹 鄂 法 格 赫 伊 嘉 卡 洛 玛 尼 欧 帕 奇 瑞 萨 塔 乌 薇 希 雅 泽"),
    vowels=split("德 尔 非 克 莱 米 诺 普 斯 特 维 兹"),
    codas=split("安 恩 林 蒙 宁 顿 亚 丝"),
    entity="~",
    relations=(
        Relation(("{e}住在哪里?", "请问{e}的家在什么地方?", "说出{e}居住的城镇。"), "{e}住在{v}镇。"),
        Relation(("{e}养什么动物?", "请问{e}家里有什么动物?", "说出{e}饲养的宠物。"), "{e}养了一只{v}鸟。"),
        Relation(("{e}的老师是谁?", "请问谁教过{e}?", "说出{e}师父的名字。"), "教{e}的人叫{v}。"),
        Relation(("{e}写了哪本书?", "请问{e}的书叫什么?", "说出{e}作品的标题。"), "{e}写的书是《{v}》。"),
    ),
    details=("这件事记在{v}的信里。",),
    sums=((TAKE, "{a}减{b}等于几?", "{a}减{b}等于{c}。"),),
    pairs=(
        (
            "{x}的反义词是什么?",
            "{x}和{y}相反。",
            _pairs("大=小, 高=低, 长=短, 黑=白, 冷=热, 快=慢, 新=旧, 多=少, 左=右, 前=后, 里=外, 远=近"),
        ),
    ),
    space="",
)

_JAPANESE = Surface(
    onsets=split("カ サ タ ナ ハ マ ヤ ラ ワ ガ ダ バ リ ミ ル ト ク モ エ ユ"),
    vowels=split("リ ル ナ ト ミ セ ロ ム キ ノ テ シ"),
    codas=split("ン ス ラ ノ ク オ ア ト"),
    entity="~",
    relations=(
        Relation(
            ("{e}はどの村に住んでいますか?", "{e}の家がある村はどこですか?", "{e}が暮らす場所を教えて。"),
            "{e}は{v}村に住んでいます。",
        ),
        Relation(
            ("{e}は何を飼っていますか?", "{e}の家にいる動物は何ですか?", "{e}のペットの名前を教えて。"),
            "{e}は{v}という犬を飼っています。",
        ),
        Relation(
            ("{e}の友達は誰ですか?", "{e}と仲がいい人は誰ですか?", "{e}が手紙を書く相手を教えて。"),
            "{e}の友達は{v}さんです。",
        ),
        Relation(
            ("{e}はどの船に乗りますか?", "{e}の船の名前は何ですか?", "{e}が海に出る船を教えて。"),
            "{e}の船は{v}号です。",
        ),
    ),
    details=("{v}の新聞に書いてあります。",),
    sums=((SUM, "{a}足す{b}はいくつですか?", "{a}足す{b}は{c}です。"),),
    pairs=(
        (
            "{x}の反対は何ですか?",
            "{x}の反対は{y}です。",
            _pairs("大きい=小さい, 高い=低い, 長い=短い, 黒い=白い, 暑い=寒い, 速い=遅い, 新しい=古い, 多い=少ない"),
        ),
    ),
    space="",
)

SURFACES = {
    ("development", "latin"): _ENGLISH_ONE,
    ("validation", "latin"): _ENGLISH_TWO,
    ("development", "cyrillic"): _RUSSIAN,
    ("development", "kana"): _JAPANESE,
    ("validation", "cjk"): _CHINESE,
}
