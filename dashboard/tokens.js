// Tokens with their latent steps. Everything from the store reaches the page as text nodes: no HTML is ever built here.

const make = (tag, className, text) => {
  const element = document.createElement(tag)
  if (className) element.className = className
  if (text !== undefined) element.textContent = text
  return element
}

const three = value => (value === null || value === undefined ? "–" : Number(value).toPrecision(3))
const needs = need => (need ? `, needs ${need === "–" ? "none: unpredictable" : need}` : "")
const steps = count => (count === 1 ? "1 latent step" : `${count} latent steps`)

const legend = data => {
  const box = make("div", "legend")
  box.append(make("span", "caption", data.legend))
  data.levels.forEach(level => {
    const chip = make("span", "chip", level.name)
    chip.style.backgroundColor = level.background
    chip.style.color = level.ink
    const share = data.tokens.length ? Math.round((100 * level.count) / data.tokens.length) : 0
    const entry = make("span", "entry")
    entry.append(chip, make("span", "share", `${share} %`))
    box.append(entry)
  })
  return box
}

// A token's way through its steps: how well it would have been predicted had it stopped after each.
const trajectory = (data, token) => {
  const box = make("div", "bars")
  box.append(make("div", "caption", "NLL after each step, nats"))
  const top = Math.max(...token.by_step, 1e-9)
  token.by_step.forEach((nll, step) => {
    const row = make("div", "bar")
    const track = make("span", "track")
    const fill = make("span", "fill")
    fill.style.width = `${(100 * nll) / top}%`
    fill.style.backgroundColor = data.palette[Math.min(step, data.most)].background
    track.append(fill)
    row.append(make("span", "step", String(step)), track, make("span", "value", three(nll)))
    box.append(row)
  })
  return box
}

const bars = (data, title, masses) => {
  const box = make("div", "bars")
  box.append(make("div", "caption", title))
  masses.forEach((mass, step) => {
    const row = make("div", "bar")
    const track = make("span", "track")
    const fill = make("span", "fill")
    fill.style.width = `${Math.max(0, Math.min(100, 100 * mass))}%`
    fill.style.backgroundColor = data.palette[Math.min(step, data.most)].background
    track.append(fill)
    row.append(make("span", "step", String(step)), track, make("span", "value", three(mass)))
    box.append(row)
  })
  return box
}

const describe = (data, panel, token, position) => {
  panel.replaceChildren()
  if (!token) return
  panel.append(make("div", "word", token.text))
  const facts = make("dl", "facts")
  const fact = (name, value) => facts.append(make("dt", "", name), make("dd", "", value))
  fact("position", String(position))
  fact("latent steps", `${token.steps} of ${data.most}`)
  if (token.need) fact("needed", token.need === "–" ? "unpredictable" : token.need)
  fact("expected", three(token.expected))
  fact("NLL", `${three(token.nll)} nats`)
  fact("probability", token.nll === null ? "–" : `${three(100 * Math.exp(-token.nll))} %`)
  panel.append(facts)
  if (token.by_step.length > 1) panel.append(trajectory(data, token))
  if (token.exit.length) panel.append(bars(data, "exit: weight of each step in the output", token.exit))
  if (token.reach.length) panel.append(bars(data, "reach: probability of getting there", token.reach))
}

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".halting")
  if (!root || !data || root.dataset.shown === data.id) return
  root.dataset.shown = data.id // the page runs this again on every update; what is on show stays as the reader left it

  const body = make("div", "body")
  const text = make("div", "text")
  text.setAttribute("role", "listbox")
  text.setAttribute("aria-label", "Tokens of the probe text with their latent steps")
  const panel = make("aside", "panel")
  panel.setAttribute("aria-live", "polite")
  let pinned = -1

  const elements = data.tokens.map((token, position) => {
    const color = data.levels[token.level]
    const element = make("span", "token")
    element.setAttribute("role", "option")
    element.setAttribute("aria-label", `${token.text}, ${steps(token.steps)}${needs(token.need)}, NLL ${three(token.nll)} nats`)
    element.setAttribute("aria-selected", "false")
    element.tabIndex = position === 0 ? 0 : -1 // one tab stop; arrows move inside
    element.dataset.position = String(position)
    element.style.backgroundColor = color.background
    element.style.color = color.ink
    element.append(make("span", "piece", token.text), make("span", "count", token.shown))
    return element
  })
  elements.forEach((element, position) => {
    text.append(element)
    if (data.tokens[position].break) text.append(make("span", "break"))
  })
  if (data.left_out > 0) text.append(make("div", "caption", `and ${data.left_out} tokens more, not shown`))

  const show = position => describe(data, panel, data.tokens[position], position)
  const pin = position => {
    if (pinned >= 0) elements[pinned].setAttribute("aria-selected", "false")
    pinned = pinned === position ? -1 : position
    if (pinned >= 0) elements[pinned].setAttribute("aria-selected", "true")
    show(position)
  }
  const at = event => {
    const element = event.target.closest ? event.target.closest(".token") : null
    return element ? Number(element.dataset.position) : -1
  }
  text.onmouseover = event => at(event) >= 0 && show(at(event))
  text.onmouseleave = () => (pinned >= 0 ? show(pinned) : opening())
  text.addEventListener("focusin", event => at(event) >= 0 && show(at(event)))
  text.onclick = event => at(event) >= 0 && pin(at(event))
  text.onkeydown = event => {
    const here = at(event)
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }
    if (here < 0) return
    if (event.key === "Enter" || event.key === " ") {
      pin(here)
      event.preventDefault()
      return
    }
    const next =
      event.key === "Home" ? 0 : event.key === "End" ? elements.length - 1 : here + (moves[event.key] ?? NaN)
    if (!elements[next]) return
    elements[here].tabIndex = -1
    elements[next].tabIndex = 0
    elements[next].focus()
    event.preventDefault()
  }

  // Before the reader points at anything, the panel explains the hardest of the tokens that were thought about most.
  let telling = 0
  data.tokens.forEach((token, position) => {
    const best = data.tokens[telling]
    if (token.steps > best.steps || (token.steps === best.steps && (token.nll ?? 0) > (best.nll ?? 0))) telling = position
  })
  const opening = () => {
    show(telling)
    panel.append(make("div", "hint", "Point at a token, or move through them with the arrow keys; Enter pins one."))
  }
  opening()
  body.append(text, panel)
  root.replaceChildren(legend(data), body)
}
