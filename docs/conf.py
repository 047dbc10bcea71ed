"""How Sphinx builds the documentation: `make docs`."""

from typing import Any

from htm_pytorch import __version__

project = "htm_pytorch"
author = "htm_pytorch contributors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "runs"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings are written as they are read in the source: `name` is a name.
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    # What torch, gymnasium and Python give to every class is theirs to document.
    "inherited-members": "Module,Env,VectorEnv,Protocol,Generic,tuple,object,"
    "ValueError,RuntimeError",
    # How parts of the package speak with each other.
    "exclude-members": "extra_repr,check_queries,moment,become,distrust,inherit,recover,reopens_as",
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"htm_pytorch {release}"
html_show_copyright = False


def from_markdown(
    app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Turn what Gymnasium's docstrings have of Markdown into reStructuredText, before napoleon."""
    if what in ("attribute", "data"):
        # Napoleon takes what is before a colon of the first line for a type; a comment has none.
        lines[:0] = ["..", ""]
    changed: list[str] = []
    is_code = False
    for line in lines:
        if line.startswith("## "):
            changed += ["", f".. rubric:: {line.removeprefix('## ')}", ""]
        elif line.startswith("```"):
            is_code = not is_code
            changed += [f".. code-block:: {line.removeprefix('```')}", ""] if is_code else [""]
        else:
            changed.append(f"    {line}" if is_code else line)
    lines[:] = changed


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("autodoc-process-docstring", from_markdown, priority=400)
