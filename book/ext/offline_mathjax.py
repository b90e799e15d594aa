"""Mathematics that needs no network: MathJax from the package sphinx-mathjax-offline.

Of its 24 MB the pages use the TeX reader, its extensions and the fonts: 3 MB. The package's own extension
would copy all.
"""

from importlib.util import find_spec
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

NEEDED = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")


def copy(app, exception):
    """Copy what the pages load beside them."""
    if exception or app.builder.format != "html":
        return
    source = Path(find_spec("sphinx-mathjax-offline").submodule_search_locations[0], "static", "mathjax")
    for name in NEEDED:
        target = Path(app.outdir, "_static", "mathjax", name)
        copy_asset(source / name, target if (source / name).is_dir() else target.parent)


def setup(app):
    if find_spec("sphinx-mathjax-offline") is None:
        raise ExtensionError("sphinx-mathjax-offline is not installed: pip install -r requirements.lock")
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
