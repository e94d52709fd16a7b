// Small helpers for a page that is drawn again every second: only what differs is touched, so that the focus stays
// where it is and screen readers read changes only.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value == null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** make("td", {class: "number"}, "text", child, …); names with a colon in front are SVG. */
export function make(name, attributes = {}, ...children) {
  const element = name.startsWith(":") ? document.createElementNS(SVG, name.slice(1)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export const icon = (name) => make(":svg", { class: `icon ${name}`, "aria-hidden": "true" }, make(":use", { href: `#icon-${name}` }));

/** Show a state by its icon and a word; colour is never all there is. */
export function setState(element, look, word) {
  if (element.dataset.look !== look) {
    element.dataset.look = look;
    element.replaceChildren(icon(look), make("span"));
  }
  setText(element.lastChild, word);
}

/** Make a list of children fit `items`: kept by key, in order; `create(item)` makes those that are missing. */
export function reconcile(parent, known, items, keyOf, create) {
  const wanted = new Set(items.map(keyOf));
  for (const [key, child] of known) {
    if (!wanted.has(key)) {
      child.element.remove();
      known.delete(key);
    }
  }
  let at = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    if (!known.has(key)) known.set(key, create(item));
    const { element } = known.get(key);
    if (element === at) at = at.nextElementSibling;
    else parent.insertBefore(element, at);
  }
}

/** Rows of a description list by name: {"Last check": "14:02:11"}. */
export function setFacts(list, facts) {
  const names = Object.keys(facts);
  const shown = [...list.children].map((row) => row.firstChild.textContent);
  if (names.join("\n") !== shown.join("\n")) {
    list.replaceChildren(...names.map((name) => make("div", {}, make("dt", {}, name), make("dd"))));
  }
  names.forEach((name, index) => setText(list.children[index].lastChild, facts[name]));
}
