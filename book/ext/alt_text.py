"""Alternative text for the pictures that cells show.

The plotting helpers store it with the output, as ``{"image/png": {"alt": "..."}}``. MyST-NB takes only width
and height from there and knows no hook for the rest, so its method is wrapped.
"""

from functools import wraps

from myst_nb.core.render import NbElementRenderer


def with_alt(render):
    """A `render_image` that also hands over the alternative text."""

    @wraps(render)
    def render_image(self, data):
        images = render(self, data)
        alt = data.output_metadata.get(data.mime_type, {}).get("alt")
        for image in images:
            if alt:
                image["alt"] = alt
        return images

    return render_image


def setup(app):
    original = NbElementRenderer.render_image
    if not hasattr(original, "__wrapped__"):  # Sphinx may set extensions up more than once in a process
        NbElementRenderer.render_image = with_alt(original)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
