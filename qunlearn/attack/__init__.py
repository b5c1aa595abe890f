"""`qunlearn audit`: attacks on an unlearned model, each with a control, and a verdict that follows the evidence."""
