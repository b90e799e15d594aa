"""Sphinx builds the course from the root of the repository:

python -m sphinx -c book -b html . _build/html

What a reader may want to change (title, author, repository, launch buttons) stands in _config.yml.
"""

import sys
from pathlib import Path

import yaml

BOOK = Path(__file__).parent
sys.path.insert(0, str(BOOK / "ext"))
settings = yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))

project = html_title = settings["title"]
author = settings["author"]
copyright = f"{settings['copyright']}, {author}"
language = "en"

extensions = [
    "myst_nb",
    "sphinx_external_toc",
    "sphinx_exercise",
    "sphinx_proof",
    "sphinxcontrib.bibtex",
    "sphinx_design",
    "sphinx_copybutton",
    "sphinx_togglebutton",
    # ours, in ext/
    "alt_text",
    "api",
    "chapter_numbers",
    "check_lines",
    "ledger",
    "number_ledger",
    "offline_mathjax",
    "run_times",
]
external_toc_path = "book/_toc.yml"  # relative to the root, unlike the two below
bibtex_bibfiles = ["references.bib"]
html_static_path = ["_static"]
html_css_files = ["course.css"]
include_patterns = ["book/*.md", "book/api/*.md", "notebooks/*.ipynb"]  # the text twins of the notebooks are no pages
exclude_patterns = [".*", "_build"]  # Sphinx would walk through the whole of .venv

myst_enable_extensions = settings["parse"]["myst_enable_extensions"]
myst_heading_anchors = 3
numfig = True
nb_execution_mode = "off"  # the committed outputs are the book; nbval proves them fresh
nb_merge_streams = True
nb_render_markdown_format = "myst"  # captions hold mathematics
nb_ipywidgets_js = {}  # what moves on a page is plain HTML: no widget manager from the network
# A page shows the picture that a control comes with. The control itself, which needs a kernel, is
# nothing there, and still better than its repr.
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", 95)]
mathjax3_config = {"options": {"enableMenu": False}}  # no macros: JupyterLab would not know them
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    # The search button of the side bar is enough.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
repository = settings.get("repository") or {}
if repository.get("url"):
    html_theme_options |= {
        "repository_url": repository["url"],
        "repository_branch": repository.get("branch", "main"),
        "use_repository_button": True,
        "use_source_button": True,
        "launch_buttons": settings.get("launch_buttons") or {},
    }
