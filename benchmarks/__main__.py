"""Lists the benchmarks with the question that each answers, or runs one: `python -m benchmarks [NAME [OPTION …]]`."""

import ast
import importlib
import sys
from pathlib import Path

from davae_jax.utils.errors import InputError


def find_questions() -> dict[str, str]:
    """Returns the first line of the docstring of each benchmark, by name. No benchmark is imported."""
    questions = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            questions[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return questions


def main(argv: list[str] | None = None) -> None:
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    questions = find_questions()
    if name in ("-h", "--help"):
        print("python -m benchmarks NAME [OPTION …]; NAME --help explains one\n")
        width = max(map(len, questions))
        print("\n".join(f"{benchmark:{width}}  {question}" for benchmark, question in questions.items()))
    elif name in questions:
        try:
            importlib.import_module(f"benchmarks.{name}").main(options)
        except InputError as e:
            print(f"python -m benchmarks {name}: {e}", file=sys.stderr)
            raise SystemExit(e.exit_code) from None
    else:
        print(f"python -m benchmarks: there is no {name!r}; choose from {', '.join(questions)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
