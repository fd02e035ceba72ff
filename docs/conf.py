"""The documentation site: `make docs` builds it from these pages and the package's docstrings."""

import os
import pathlib
import re
import sys
import warnings

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from numpy.typing import ArrayLike

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the kernels of notebooks, which run elsewhere

import fedlp_jax  # noqa: E402, the path has to be set first


def name_of_type(annotation, config):
    """Names NumPy's ArrayLike, which would be a union of seven types; None = as usual."""
    del config
    return "``ArrayLike``" if annotation == ArrayLike else None


project = "fedlp_jax"
author = "The fedlp_jax authors"
release = fedlp_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_autodoc_typehints",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fedlp_jax"
html_show_copyright = False
html_theme_options = {
    name: {"code-font-size": "0.8rem"}  # 90 columns fit
    for name in ("light_css_variables", "dark_css_variables")
}

# Pages are to read well on a forge, too: mathematics stands in fences, and links lead to files.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
html_math_renderer = "mathml"  # browsers show it without a script and without a network

# A notebook runs when one of its cells has changed. An error in a cell fails the build.
nb_execution_mode = "cache"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Other Arguments", "params_style")]
typehints_defaults = "comma"
typehints_formatter = name_of_type
warnings.filterwarnings("ignore", module="sphinx_autodoc_typehints")  # it calls Sphinx's old API
suppress_warnings = [
    "config.cache",  # a function, `name_of_type`, among the settings
    "sphinx_autodoc_typehints.forward_reference",  # flax evaluates the types of fields late
    "sphinx_autodoc_typehints.guarded_import",  # of an extra that is not installed
]

# Files outside of docs/ that are pages here.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}


def include_and_link(app, page, source):
    """Inserts files of the repository, and makes links lead to pages and files from here."""
    del app
    folder = (DOCS / page).parent
    include = re.fullmatch(r"```\{include\} (\S+)\n```\n", source[0])
    if include:
        file = folder / include[1]
        source[0], origin = file.read_text(), file.parent
    else:
        origin = folder

    def moved(match):
        target, _, anchor = match[2].partition("#")
        file = (origin / target).resolve()
        if "://" in match[2] or not target or not file.is_relative_to(ROOT):
            return match[0]
        if file.is_dir():  # a site has nothing to show for it
            return match[1]
        name = str(file.relative_to(ROOT))
        if name == "README.md":  # its sections are pages of their own here
            anchor = ""
        path = os.path.relpath(DOCS / PAGES[name] if name in PAGES else file, folder)
        return f"[{match[1]}]({path}{anchor and '#' + anchor})"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", moved, source[0])


def markdown_to_rst(app, what, name, obj, options, lines):
    """Docstrings are written as they are read in an editor: code in backticks or indented."""
    del app, what, name, obj, options
    parts = re.split(r"``?([^`]+)``?", "\n".join(lines))  # every second one is code
    parts[::2] = [re.sub(r"(?<!\n)([*|])(?! )|\|", r"\\\g<0>", part) for part in parts[::2]]
    parts[::2] = [
        re.sub(r"(?m)^(\s+\w+: [A-Z])\.$", r"\1\\.", part) for part in parts[::2]
    ]  # no list
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    lines[:] = []
    above, literal = "", False  # the last line that is not blank; whether this one is code
    for line in "".join(parts).splitlines():
        after_blank, begins = not (lines and lines[-1]), line.startswith(" " * 4)
        if after_blank and begins and above and not above.startswith(" "):
            lines += ["::", ""]
            literal = True
        elif line and not begins:
            literal = False
        if line.lstrip().startswith("* ") and not after_blank:
            lines.append("")
        lines.append(re.sub(r"\\([*|])", r"\1", line) if literal else line)
        above = line or above


def mathml(block):
    """Writes mathematics as MathML, which docutils can make."""

    def visit(translator, node):
        formula = tex2mathml(node.astext(), as_block=block)
        translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Connects the above to Sphinx."""
    app.connect("source-read", include_and_link)
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)  # before napoleon
    app.add_html_math_renderer(
        "mathml", inline_renderers=mathml(block=False), block_renderers=mathml(block=True)
    )
