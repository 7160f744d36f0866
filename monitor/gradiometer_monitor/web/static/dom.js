// Elements. What comes from a run becomes a text node or an attribute, never markup.

export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Change a text only when it is another, so that a selection in it or a reader of it is not disturbed.
export function put(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// A text whose long names may break after a dot or an underscore.
export function breakable(text) {
  return text.split(/(?<=[._/])(?=\w)/).flatMap((part, place) => (place ? [h("wbr"), part] : [part]));
}

export function say(text) {
  put(document.getElementById("say"), text);
}

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
