"""List the methods.

python -m methods
"""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*.py")):
    tree = ast.parse(path.read_text())
    functions = [one.name for one in tree.body if isinstance(one, ast.FunctionDef)]
    if "main" in functions:
        first_line = ast.get_docstring(tree).splitlines()[0]
        print(f"python -m methods.{path.stem:18}{first_line}")
