"""What a person would miss on a page: names, sizes and contrasts, read from what is computed.

Nothing here asks the library: colours are composited and compared anew, and names come from the
tree that Chromium hands to screen readers.
"""

from typing import Any

# What can be operated or looked at, and so needs a name.
NAMED = {
    *("button", "slider", "spinbutton", "checkbox", "radio", "switch", "combobox", "listbox"),
    *("textbox", "searchbox", "tab", "menuitem", "link", "progressbar", "application", "img"),
    *("image", "Canvas", "figure", "dialog"),
}
SMALLEST = 9  # pixels

# Before any other script of a page: what is written on a canvas, how large, and on what.
WATCH_CANVASES = """(() => {
  window.canvasWords = [];
  const write = CanvasRenderingContext2D.prototype.fillText;
  CanvasRenderingContext2D.prototype.fillText = function (text, x, y, ...rest) {
    if (window.watchCanvases && String(text).trim() && this.canvas.isConnected) {
      const { a, b } = this.getTransform();
      const scale = this.canvas.getBoundingClientRect().width / this.canvas.width;
      const pixels = parseFloat(this.font.match(/([\\d.]+)px/)[1]);
      const at = new DOMPoint(x, y).matrixTransform(this.getTransform());
      const under = [...this.getImageData(Math.round(at.x), Math.round(at.y), 1, 1).data];
      window.canvasWords.push({
        text: String(text), size: pixels * Math.hypot(a, b) * scale, under,
        colour: this.fillStyle, alpha: this.globalAlpha, canvas: this.canvas,
      });
    }
    return write.call(this, text, x, y, ...rest);
  };
})()"""

# Of an element: the colours behind it, and how far two colours are apart.
_COLOURS = """
  const parse = (colour) => {
    if (colour.startsWith("#")) {
      return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)).concat(1);
    }
    const numbers = colour.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const unit = colour.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((one) => one * unit), numbers[3] ?? 1];
  };
  const over = (top, under, alpha) =>
    [0, 1, 2].map((i) => top[i] * alpha + under[i] * (1 - alpha));
  const luminance = (c) => {
    const [r, g, b] = c.map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const parent = (el) => el.assignedSlot ?? el.parentElement ?? el.getRootNode().host;
  const background = (el) => {
    const layers = [];
    for (let one = el; one; one = parent(one)) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const page = dark ? [18, 18, 18] : [255, 255, 255];
    return layers.reduceRight((under, top) => over(top, under, top[3]), page);
  };
"""
_FIND = (
    "(root) => {"
    + _COLOURS
    + """
  const opacity = (el) => {
    let share = 1;
    for (let one = el; one; one = parent(one)) share *= Number(getComputedStyle(one).opacity);
    return share;
  };
  const hidden = (el) => {
    if (!el.checkVisibility({ visibilityProperty: true })) return true;
    for (let one = el; one; one = parent(one)) {
      const style = getComputedStyle(one);
      if (style.clipPath === "inset(50%)" || style.clip === "rect(0px, 0px, 0px, 0px)") return true;
      if (one.matches("[aria-disabled=true], :disabled, fieldset:disabled *")) return true;
      // KaTeX and MathJax keep a copy for screen readers, JupyterLab line ends for copying.
      if (one.matches("script, style, mjx-assistive-mml, .cm-editor")) return true;
    }
    return false;
  };
  const troubles = new Map();
  const note = (trouble, text) => {
    if (!troubles.has(trouble)) troubles.set(trouble, text.trim().slice(0, 40));
  };
  const check = (text, size, ink, paper) => {
    const ratio = contrast(ink, paper);
    if (size < SMALLEST - 0.05) note(`${size.toFixed(1)} px`, text);
    const [top, under] = [ink, paper].map((colour) => colour.map(Math.round));
    if (ratio < 4.495) note(`${ratio.toFixed(2)} : 1, ${top} on ${under}`, text);
  };
  const visit = (el) => {
    if (el.shadowRoot) visit(el.shadowRoot);
    for (const child of el.childNodes) {
      if (child.nodeType === Node.ELEMENT_NODE) visit(child);
      if (child.nodeType !== Node.TEXT_NODE || !child.data.trim()) continue;
      const holder = child.parentElement ?? el.host;
      if (!holder || hidden(holder)) continue;
      const range = document.createRange();
      range.selectNodeContents(child);
      const box = range.getBoundingClientRect();
      if (!box.width || !box.height) continue;
      const style = getComputedStyle(holder);
      const paper = background(holder);
      const svg = holder.ownerSVGElement;
      const scale = svg ? Math.hypot(holder.getScreenCTM().a, holder.getScreenCTM().b) : 1;
      const colour = parse(svg ? style.fill : style.color);
      const ink = over(colour, paper, colour[3] * opacity(holder));
      check(child.data, parseFloat(style.fontSize) * scale, ink, paper);
    }
  };
  visit(root);
  for (const word of window.canvasWords ?? []) {
    if (!root.contains(word.canvas)) continue;
    const below = background(word.canvas);
    const paper = over(word.under, below, word.under[3] / 255);
    const colour = parse(word.colour);
    check(word.text, word.size, over(colour, paper, colour[3] * word.alpha), paper);
  }
  return [...troubles].map(([trouble, text]) => `${trouble}: ${text}`);
}""".replace("SMALLEST", str(SMALLEST))
)
_FAINT = (
    "(root) => {"
    + _COLOURS
    + """
  const found = [];
  const check = (what, el, colour, paper) => {
    const mark = parse(colour);
    if (!mark[3]) return;
    const ratio = contrast(over(mark, paper, mark[3]), paper);
    const name = el.className || el.tagName;
    // What has the colour of its ground keeps room for a sign and is none.
    if (ratio > 1.005 && ratio < 2.995) found.push(`${ratio.toFixed(2)} : 1, ${what} of ${name}`);
  };
  for (const el of root.querySelectorAll("button, input, select, textarea, [data-token]")) {
    if (!el.checkVisibility() || el.matches(":disabled")) continue;
    const style = getComputedStyle(el);
    const outside = background(parent(el));
    // A field's border stands out from what is around it, a token's signs from its own ground.
    for (const side of ["Top", "Right", "Bottom", "Left"]) {
      if (parseFloat(style[`border${side}Width`]) && style[`border${side}Style`] !== "none") {
        check("border", el, style[`border${side}Color`], outside);
      }
    }
    if (style.textDecorationLine !== "none") {
      check("line", el, style.textDecorationColor, background(el));
    }
  }
  return [...new Set(found)];
}"""
)
# The strongest contrast of a canvas's pixels in boxes of [left, top, width, height] with its paper.
_PAINTED = (
    "(canvas, boxes) => {"
    + _COLOURS
    + """
  const pen = canvas.getContext("2d");
  const ratio = canvas.width / canvas.getBoundingClientRect().width;
  const paper = background(canvas);
  return boxes.map((box) => {
    const [left, top, width, height] = box.map((one) => Math.round(one * ratio));
    const { data } = pen.getImageData(left, top, Math.max(1, width), Math.max(1, height));
    let most = 1;
    for (let i = 0; i < data.length; i += 4) {
      const colour = over([...data.slice(i, i + 3)], paper, data[i + 3] / 255);
      most = Math.max(most, contrast(colour, paper));
    }
    return most;
  });
}"""
)


def hard_to_read(element: Any) -> list[str]:
    """Text under an element that is below 9 pixels, or whose contrast is below 4.5 : 1."""
    return element.evaluate(_FIND)


def faint_marks(element: Any) -> list[str]:
    """Borders of fields, and lines of tokens, whose contrast is below 3 : 1."""
    return element.evaluate(_FAINT)


def painted_contrasts(canvas: Any, boxes: list[list[float]]) -> list[float]:
    """How far what is painted in each box of a canvas stands out from the page."""
    return canvas.evaluate(_PAINTED, boxes)


def unnamed(element: Any) -> list[str]:
    """Controls, buttons and canvases without a name, sliders without a text of their value."""
    troubles = []
    for role, name, value in spoken(element):
        if role in NAMED and not name.strip():
            troubles.append(f"{role} without a name")
        if role in ("slider", "spinbutton") and not value.strip():
            troubles.append(f"{role} {name!r} without a value")
    return troubles


def spoken(element: Any) -> list[tuple[str, str, str]]:
    """Role, name and value of all that a screen reader finds under an element."""
    session = element.page.context.new_cdp_session(element.page)
    element.evaluate("el => { window.lookedAt = el; }")
    handle = session.send("Runtime.evaluate", {"expression": "window.lookedAt"})["result"]
    answer = session.send("Accessibility.queryAXTree", {"objectId": handle["objectId"]})
    session.detach()
    found = []
    for node in answer["nodes"]:
        if not node["ignored"]:
            said = {each["name"]: each["value"].get("value") for each in node["properties"]}
            value = said.get("valuetext") or node.get("value", {}).get("value", "")
            name = node.get("name", {}).get("value", "")
            found.append((node["role"]["value"], name, str(value)))
    return found
