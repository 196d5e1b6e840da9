"use strict";
/* Two pens that draw the same shapes: on a canvas for the screen, and as SVG for files and printing. Both take
   colors from picture.css. The canvas asks the browser for the style of a class. */

const Paint = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace';
  const TAGS = { path: "path", text: "text" };

  /* Returns the style of a shape's class in a group's class. */
  class Looks {
    constructor() {
      this.known = new Map();
      this.stage = document.createElementNS(SVG, "svg");
      this.stage.setAttribute("class", "picture probe");
      this.stage.setAttribute("aria-hidden", "true");
      document.body.append(this.stage);
    }

    forget() { this.known.clear(); }

    of(group, shape, tag) {
      let shapes = this.known.get(group);
      if (!shapes) this.known.set(group, shapes = new Map());
      let look = shapes.get(shape);
      if (look) return look;
      const outer = document.createElementNS(SVG, "g"), inner = document.createElementNS(SVG, tag);
      outer.setAttribute("class", group);
      inner.setAttribute("class", shape);
      outer.append(inner);
      this.stage.append(outer);
      const style = getComputedStyle(inner);
      const paint = (value) => (value === "none" || value === "rgba(0, 0, 0, 0)" ? null : value);
      look = {
        fill: paint(style.fill), stroke: paint(style.stroke), width: parseFloat(style.strokeWidth) || 0,
        dash: style.strokeDasharray === "none" ? [] : style.strokeDasharray.split(/[ ,]+/).map(parseFloat),
        size: parseFloat(style.fontSize), weight: style.fontWeight, align: style.textAnchor === "middle" ? "center" : "left",
        opacity: parseFloat(style.opacity) * parseFloat(getComputedStyle(outer).opacity),
      };
      outer.remove();
      shapes.set(shape, look);
      return look;
    }
  }

  class CanvasPen {
    /* `scale`: pixels per unit. Shapes that are too small to see are left out. */
    constructor(context, looks, scale) {
      Object.assign(this, { context, looks, scale, group: "", dx: 0, dy: 0, font: "" });
      this.stack = [];
    }

    begin(group, x, y) {
      this.stack.push([this.group, this.dx, this.dy]);
      this.group = group;
      this.dx += x;
      this.dy += y;
    }

    end() { [this.group, this.dx, this.dy] = this.stack.pop(); }

    ink(look, fill) {
      const { context } = this;
      context.globalAlpha = look.opacity;
      this.last = null;
      if (fill ?? look.fill) { context.fillStyle = fill ?? look.fill; context.fill(); }
      if (!look.stroke || !look.width) return;
      context.strokeStyle = look.stroke;
      context.lineWidth = look.width;
      context.setLineDash(this.scale < 0.25 ? [] : look.dash);
      context.stroke();
    }

    rect(shape, x, y, width, height, radius = 0, fill = null) {
      const look = this.looks.of(this.group, shape, "rect"), { context } = this;
      context.beginPath();
      if (this.scale < 0.3) context.rect(x + this.dx, y + this.dy, width, height);
      else context.roundRect(x + this.dx, y + this.dy, width, height, radius);
      this.ink(look, fill);
    }

    spot(group, x, y, width, height, fill) {
      const color = fill ?? this.looks.of(group, "frame", "rect").stroke;
      if (color !== this.last) this.context.fillStyle = this.last = color;
      this.context.globalAlpha = 0.7;
      this.context.fillRect(x, y, width, height);
    }

    text(shape, x, y, words) {
      const look = this.looks.of(this.group, shape, "text"), { context } = this;
      if (look.size * this.scale < 3.5) return;
      const font = `${look.weight} ${look.size}px ${FONT}`;
      if (font !== this.font) context.font = this.font = font;
      context.globalAlpha = look.opacity;
      context.textAlign = look.align;
      this.last = null;
      context.fillStyle = look.fill;
      context.fillText(words, x + this.dx, y + this.dy);
    }

    /* `steps`: [command, numbers...] of M, L and C, absolute. */
    path(shape, steps) {
      const look = this.looks.of(this.group, shape, "path"), { context, dx, dy } = this;
      context.beginPath();
      for (const [command, ...at] of steps) {
        for (let i = 0; i < at.length; i += 2) { at[i] += dx; at[i + 1] += dy; }
        if (command === "M") context.moveTo(...at);
        else if (command === "L") context.lineTo(...at);
        else context.bezierCurveTo(...at);
      }
      this.ink(look);
    }
  }

  class SvgPen {
    constructor(root) { this.at = root; this.scale = 1; }

    make(tag, attributes, words) {
      const made = document.createElementNS(SVG, tag);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (words !== undefined) made.textContent = words;
      this.at.append(made);
      return made;
    }

    begin(group, x, y) { this.at = this.make("g", { class: group, transform: `translate(${n(x)} ${n(y)})` }); }

    end() { this.at = this.at.parentNode; }

    rect(shape, x, y, width, height, radius = 0, fill = null) {
      const look = fill ? { style: `fill:${fill}` } : {};
      this.make("rect", { class: shape, x: n(x), y: n(y), width: n(width), height: n(height), rx: radius, ...look });
    }

    text(shape, x, y, words) { this.make("text", { class: shape, x: n(x), y: n(y) }, words); }

    path(shape, steps) {
      this.make("path", { class: shape, d: steps.map(([c, ...at]) => c + at.map(n).join(" ")).join("") });
    }
  }

  const n = (value) => Math.round(value * 10) / 10;

  return { Looks, CanvasPen, SvgPen, SVG };
})();
