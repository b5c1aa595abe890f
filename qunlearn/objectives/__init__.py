"""The unlearning objectives: a page of equations, the table of methods, and how several losses combine."""
