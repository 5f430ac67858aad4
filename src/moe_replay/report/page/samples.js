// The sample browser. Texts of completions reach the page as text nodes only.
"use strict";

const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

function visible(text) {
  return text.replace(UNSEEN, (found) => {
    const code = found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `⟨U+${code}⟩`;
  });
}

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = visible(String(text));
  return made;
}

function short(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) < 10 ** -digits && value !== 0
    ? value.toExponential(1)
    : String(Number(value.toFixed(digits)));
}

const LARGEST = 0.7; // ln 2: tokens off by twice have the full colour

function tint(ratio) {
  const part = Math.min(1, Math.abs(ratio) / LARGEST);
  if (part < 0.02) return "transparent";
  return `rgba(var(--${ratio > 0 ? "more" : "less"}),${(0.12 + 0.68 * part).toFixed(3)})`;
}

function ratioOf(tokens, at) {
  return tokens.old[at] - tokens.rollout[at];
}

function tokenWords(tokens, at) {
  const flips = tokens.flips === null ? null : tokens.flips[at];
  const count = flips ? `${flips} ${flips === 1 ? "layer flips" : "layers flip"}` : "no layer flips";
  const flipped = flips === null ? "routes not compared" : count;
  return (
    `Token ${at + 1} of ${tokens.texts.length + tokens.omitted} ${JSON.stringify(tokens.texts[at])}: ` +
    `engine ${short(Math.exp(tokens.rollout[at]))}, trainer ${short(Math.exp(tokens.old[at]))}, ` +
    `ln ratio ${short(ratioOf(tokens, at))}, ${flipped}`
  );
}

function tokenStrip(tokens) {
  const strip = element("div", "tokens");
  strip.tabIndex = 0;
  strip.setAttribute("role", "group");
  strip.setAttribute("aria-label", "Tokens; the left and right arrow keys move between them");
  const words = element("p", "token-words");
  words.setAttribute("aria-live", "polite");
  const spans = tokens.texts.map((text, at) => {
    const span = element("span", "token", text.replaceAll("\n", "⏎\n"));
    span.style.background = tint(ratioOf(tokens, at));
    const flips = tokens.flips === null ? null : tokens.flips[at];
    if (flips) span.style.borderBottomWidth = `${Math.min(5, 1 + flips)}px`;
    if (flips) span.classList.add("flipped");
    span.dataset.at = String(at);
    strip.append(span);
    return span;
  });
  let active = -1;
  const choose = (at) => {
    if (at < 0 || at >= spans.length) return;
    if (active >= 0) spans[active].classList.remove("active");
    active = at;
    spans[at].classList.add("active");
    words.textContent = visible(tokenWords(tokens, at));
  };
  for (const kind of ["mouseover", "click"]) {
    strip.addEventListener(kind, (event) => {
      if (event.target.dataset.at !== undefined) choose(Number(event.target.dataset.at));
    });
  }
  strip.addEventListener("focus", () => active < 0 && choose(0));
  strip.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: active + 1, ArrowLeft: active - 1, Home: 0, End: spans.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key]);
  });
  const far = tokens.texts.map((_, at) => at);
  far.sort((a, b) => Math.abs(ratioOf(tokens, b)) - Math.abs(ratioOf(tokens, a)));
  if (far.length) choose(far[0]);
  const parts = [strip, words];
  if (tokens.omitted) parts.push(element("p", "quiet", `${tokens.omitted} more tokens are omitted.`));
  return [...parts, legend(), tokenTable(tokens)];
}

function legend() {
  const made = element("p", "quiet legend");
  for (const [ratio, text] of [[-LARGEST, "trainer half as sure"], [LARGEST, "trainer twice as sure"]]) {
    const swatch = element("span", "token", "\u00a0\u00a0\u00a0");
    swatch.style.background = tint(ratio);
    made.append(swatch, ` ${text}  `);
  }
  const flipped = element("span", "token flipped", "flip");
  flipped.style.borderBottomWidth = "3px";
  made.append(flipped, " some layer flips; thicker: more layers");
  return made;
}

function tokenTable(tokens) {
  const details = element("details");
  details.append(element("summary", "", "Tokens as a table"));
  details.addEventListener("toggle", () => {
    if (details.querySelector("table")) return;
    const scroll = element("div", "scroll");
    scroll.tabIndex = 0;
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const name of ["token", "text", "engine", "trainer", "ln ratio", "flips"]) {
      const cell = element("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    tokens.texts.forEach((text, at) => {
      const row = body.insertRow();
      const flips = tokens.flips === null ? null : tokens.flips[at];
      const cells = [at + 1, JSON.stringify(text), short(Math.exp(tokens.rollout[at]))];
      cells.push(short(Math.exp(tokens.old[at])), short(ratioOf(tokens, at)), flips ?? "–");
      for (const cell of cells) row.append(element("td", "", cell));
    });
    scroll.append(table);
    details.append(scroll);
  });
  return details;
}

function sampleName(sample, at) {
  const name = sample.sample === null ? `no. ${at + 1}` : `sample ${sample.sample}`;
  const marks = [];
  if (sample.dropped) marks.push(`dropped: ${sample.dropped}`);
  else if (sample.tokens) marks.push("with tokens");
  return marks.length ? `${name} (${marks.join(", ")})` : name;
}

function showSample(sample) {
  const place = document.getElementById("sample");
  place.replaceChildren();
  if (!sample) {
    place.append(element("p", "empty", "This run has no completions to show."));
    return;
  }
  if (sample.dropped) {
    const why = sample.dropped === "misaligned" ? "its routes were of other tokens" : "drift took its routes";
    place.append(element("p", "alert", `Dropped by the guard: ${why}. It was not trained on.`));
  }
  const known = [
    ["reward", short(sample.reward)],
    ["advantage", short(sample.advantage)],
    ["tokens", sample.numTokens],
    ["ended by", sample.finish],
    ["agreement", sample.agreement === null ? "–" : `${(100 * sample.agreement).toFixed(2)} %`],
    ["dataset item", sample.item],
    ["policy version", sample.version],
  ];
  if (sample.server) known.push(["server", sample.server]);
  const list = element("dl");
  for (const [name, value] of known) {
    const row = element("div");
    row.append(element("dt", "", name), element("dd", "", value));
    list.append(row);
  }
  place.append(list, element("h3", "", "Prompt"), element("pre", "text", sample.prompt));
  place.append(element("h3", "", "Completion"));
  if (sample.tokens) place.append(...tokenStrip(sample.tokens));
  else {
    place.append(element("pre", "text", sample.completion));
    place.append(element("p", "quiet", "Its tokens were not kept (logging.num_with_tokens)."));
  }
}

const choices = ["run", "step", "index"].map((name) => document.getElementById(`sample-${name}`));
const [runChoice, stepChoice, sampleChoice] = choices;

function samplesOfStep() {
  const samples = facts.samples[Number(runChoice.value)];
  return samples.filter((sample) => sample.step === Number(stepChoice.value));
}

function fillSamples() {
  const samples = samplesOfStep();
  sampleChoice.replaceChildren(...samples.map((s, at) => new Option(sampleName(s, at), String(at))));
  const telling = samples.findIndex((sample) => sample.dropped);
  const withTokens = samples.findIndex((sample) => sample.tokens);
  sampleChoice.value = String(Math.max(0, telling >= 0 ? telling : withTokens));
  showSample(samples[Number(sampleChoice.value)]);
}

function fillSteps() {
  const samples = facts.samples[Number(runChoice.value)];
  const steps = [...new Set(samples.map((sample) => sample.step))];
  const dropped = new Set(samples.filter((s) => s.dropped).map((s) => s.step));
  stepChoice.replaceChildren(
    ...steps.map((step) => new Option(dropped.has(step) ? `${step} (a sample was dropped)` : step, step)),
  );
  if (dropped.size) stepChoice.value = String([...dropped][0]);
  fillSamples();
}

facts.runs.forEach((run, at) => runChoice.add(new Option(visible(run.name), String(at))));
const telling = facts.samples.findIndex((samples) => samples.some((sample) => sample.dropped));
runChoice.value = String(Math.max(0, telling));
runChoice.addEventListener("change", fillSteps);
stepChoice.addEventListener("change", fillSamples);
sampleChoice.addEventListener("change", () => showSample(samplesOfStep()[Number(sampleChoice.value)]));
fillSteps();

for (const button of document.querySelectorAll("[data-show-run]")) {
  button.addEventListener("click", () => {
    runChoice.value = button.dataset.showRun;
    fillSteps();
    document.getElementById("samples").scrollIntoView();
    sampleChoice.focus({ preventScroll: true });
  });
}
