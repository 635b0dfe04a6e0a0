"""Sphinx's settings of the web edition; `build.py` lays out the sources and calls it."""

project = "dpo_mini"
html_title = "DPO, from preferences to a model"
extensions = ["myst_nb"]
exclude_patterns = []
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

nb_execution_mode = "off"  # the outputs are the stored ones
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
mathjax_path = "mathjax/tex-chtml.js"  # from this site: no page asks another server
mathjax3_config = {"options": {"enableMenu": False}}


def name_the_level(app, pagename, templatename, context, doctree):
    """Sphinx calls the captions of the contents headings, and does not say of which level."""
    tree = context.get("furo_navigation_tree", "")
    levelled = tree.replace('role="heading"', 'role="heading" aria-level="2"')
    context["furo_navigation_tree"] = levelled


def setup(app):
    app.connect("html-page-context", name_the_level, priority=900)  # after the theme's own
