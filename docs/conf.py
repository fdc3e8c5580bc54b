"""Configuration of Sphinx for the pages that `docs/build.py` prepares."""

import inspect
import re
from importlib.metadata import version as installed_version

from fastcore.docments import docments, empty

project, author = "otseg", "the otseg developers"
release = installed_version("otseg")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax", "sphinx_design"]
exclude_patterns = ["extra/*", "results/*"]
html_extra_path = ["extra"]
nb_execution_mode = "off"  # committed outputs are shown
nb_merge_streams = True
nb_render_markdown_format = "myst"  # the default does not know tables
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "colon_fence"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["mystnb.unknown_mime_type"]

smartquotes = False  # ... stays three points in shapes

html_theme = "pydata_sphinx_theme"
html_title = "otseg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["mermaid.min.js", "mermaid_start.js"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"index": [], "nbs/index": []}
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}
mathjax_path = "mathjax/tex-mml-svg.js"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False


def as_rst(text: str) -> str:
    "A line of Markdown with code in backticks as reStructuredText."
    parts = re.split(r"(`[^`]+`)", text)
    plain = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
    code = [f"`{part}`" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(plain, [*code, ""]))


def add_comments(app, what, name, thing, options, lines):
    "Docstrings are Markdown; the comments beside the parameters, which nbdev calls docments, become fields."
    lines[:] = [as_rst(line) for line in lines]
    try:
        found = docments(thing, full=True, returns=True)
    except (TypeError, ValueError, OSError, SyntaxError):
        return
    fields = []
    for parameter, about in found.items():
        if parameter not in ("self", "cls") and about.get("docment") not in (None, empty, ""):
            comment = as_rst(" ".join(str(about["docment"]).split()))
            fields.append(f":returns: {comment}" if parameter == "return" else f":param {parameter}: {comment}")
    if fields and (inspect.isfunction(thing) or inspect.isclass(thing) or inspect.ismethod(thing)):
        lines += ["", *fields]


def add_mermaid(app):
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Mermaid(Directive):
        has_content = True

        def run(self):
            text = "\n".join(self.content).replace("&", "&amp;").replace("<", "&lt;")
            return [nodes.raw("", f'<pre class="mermaid">{text}</pre>', format="html")]

    app.add_directive("mermaid", Mermaid)


def setup(app):
    app.connect("autodoc-process-docstring", add_comments)
    add_mermaid(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
