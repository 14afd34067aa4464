
"use strict";
// Whatever comes from the service or from a person is shown with textContent only: it is text, never markup.

const byId = (id) => document.getElementById(id);

// For a model that only continues text: examples first, so that it sees what is wanted. `asks` and `replies` begin the
// lines of the two sides; a prompt that ends with a question gets the beginning of the reply by itself.
const CONTINUING = {
  answer: {
    prompt: "Question: What is the capital of Japan?\nAnswer: Tokyo.\n\n" +
      "Question: Who wrote the novel Pride and Prejudice?\nAnswer: Jane Austen.\n\n" +
      "Question: What is the longest river in the world?\nAnswer:",
    hint: "Examples come first, so that the model sees what is wanted; your question stands last.",
    length: 32, temperature: 0, stop: ["\n\n", "\nQuestion:"], asks: "Question:", replies: "Answer:", gap: "\n\n",
  },
  chat: {
    prompt: "A conversation between a person and a helpful, friendly assistant.\n\n" +
      "Person: Hello! What can you help me with?\n" +
      "Assistant: I can explain ideas, answer questions or help you write. What is on your mind?\n" +
      "Person: I would like to cook something simple tonight. Any ideas?\nAssistant:",
    hint: "Add the answer to the prompt to go on with the conversation.",
    length: 96, temperature: 0.8, stop: ["\nPerson:", "\n\n"], asks: "Person:", replies: "Assistant:", gap: "\n",
  },
  translate: {
    prompt: "English: Good morning, how are you?\nFrench: Bonjour, comment allez-vous ?\n\n" +
      "English: Where is the train station?\nFrench: Où est la gare ?\n\n" +
      "English: I would like a cup of coffee, please.\nFrench:",
    hint: "Two translations show the pair of languages; the sentence to translate stands last.",
    length: 48, temperature: 0, stop: ["\n"], asks: "English:", replies: "French:", gap: "\n\n",
  },
  write: {
    prompt: "It was the last evening of summer, and the lighthouse keeper had just lit the lamp when",
    hint: "The model continues this text.",
    length: 160, temperature: 0.9, stop: [], gap: "",
  },
};

// For a model with a chat template: the same tasks, asked for in words.
const ASKING = {
  answer: { prompt: "What is the longest river in the world? Answer in one sentence.", length: 64, temperature: 0 },
  chat: { prompt: "I would like to cook something simple tonight. Any ideas?", length: 200, temperature: 0.7 },
  translate: { prompt: "Translate into French: I would like a cup of coffee, please.", length: 64, temperature: 0 },
  write: {
    prompt: "Write the opening of a story about a lighthouse keeper on the last evening of summer.",
    length: 256, temperature: 0.9,
  },
};

const state = {
  task: "answer", usesTemplate: false, isReady: false, drafts: {}, turns: [], running: null, answer: "", trend: new Array(60).fill(0), seen: null,
  key: sessionStorage.getItem("key") || "",
};

const template = () => (state.usesTemplate ? ASKING : CONTINUING)[state.task];

// -- what a person sets ----------------------------------------------------------------------------------------------

function showTask() {
  const chosen = template();
  byId("prompt").value = state.drafts[state.task] ?? chosen.prompt;
  byId("prompt-label").textContent = state.usesTemplate ? "Message" : "Prompt";
  byId("prompt").rows = state.usesTemplate ? 4 : 9;
  byId("hint").textContent = state.usesTemplate ? "The model's own chat template is put around this." : chosen.hint;
  byId("length").value = chosen.length;
  byId("temperature").value = chosen.temperature;
  showSettings();
  showTurns();
}

function showSettings() {
  byId("length-shown").textContent = byId("length").value + " tokens";
  const temperature = Number(byId("temperature").value);
  byId("temperature-shown").textContent = temperature === 0 ? "0, the likeliest" : temperature.toFixed(2);
}

function showTurns() {
  const list = byId("turns");
  list.replaceChildren(...state.turns.map((turn) => {
    const item = document.createElement("li");
    item.dataset.role = turn.role;
    item.textContent = turn.content;
    return item;
  }));
  list.hidden = !(state.usesTemplate && state.task === "chat" && state.turns.length);
  byId("reset").textContent = list.hidden ? "Reset to the example" : "New conversation";
}

function chooseTask(task) {
  state.drafts[state.task] = byId("prompt").value;
  state.task = task;
  showTask();
}

function reset() {
  delete state.drafts[state.task];
  state.turns = [];
  showTask();
  byId("prompt").focus();
}

function keepAnswer() {
  const field = byId("prompt");
  const chosen = template();
  field.value += state.answer.trimEnd() + (chosen.asks ? chosen.gap + chosen.asks + " " : "");
  clearAnswer();
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
  field.scrollTop = field.scrollHeight;
}

function completedPrompt() {
  const field = byId("prompt");
  const chosen = template();
  const lines = field.value.trimEnd().split("\n");
  if (chosen.asks && lines[lines.length - 1].startsWith(chosen.asks)) {
    field.value = field.value.trimEnd() + "\n" + chosen.replies;
  }
  // A space at the end would be a token of its own, after which models go astray.
  return chosen.replies ? field.value.trimEnd() : field.value;
}

// -- one answer ------------------------------------------------------------------------------------------------------

function number(id) {
  const text = byId(id).value;
  return text === "" ? undefined : Number(text);
}

function requestBody() {
  const body = {
    temperature: number("temperature"), top_p: number("top-p"), top_k: number("top-k"), seed: number("seed"),
    repetition_penalty: number("penalty"), max_tokens: number("length"),
    stream: true, stream_options: { include_usage: true },
  };
  if (!state.usesTemplate) {
    const stop = template().stop;
    return { ...body, prompt: completedPrompt(), ...(stop.length ? { stop } : {}) };
  }
  const message = { role: "user", content: byId("prompt").value };
  return { ...body, messages: state.task === "chat" ? [...state.turns, message] : [message] };
}

function headers() {
  return state.key ? { Authorization: "Bearer " + state.key } : {};
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function clearAnswer() {
  state.answer = "";
  byId("answer").replaceChildren();
  byId("keep").hidden = true;
  byId("speed").textContent = "";
  sayTrouble("");
}

function addText(text) {
  const shown = state.answer ? text : text.trimStart();
  state.answer += text;
  if (!shown) return;
  const piece = document.createElement("span");
  piece.textContent = shown;
  byId("answer").append(piece);
}

function sayTrouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

function setRunning(controller) {
  state.running = controller;
  byId("generate").disabled = controller !== null || !state.isReady;
  byId("stop").disabled = controller === null;
  byId("answer").classList.toggle("running", controller !== null);
  byId("answer").classList.toggle("waiting", controller !== null);
}

function sayCounts(counts, ending) {
  const pieces = [counts.tokens + (counts.tokens === 1 ? " token" : " tokens")];
  const seconds = (counts.last - counts.first) / 1000;
  if (counts.tokens > 1 && seconds > 0) pieces.push(((counts.tokens - 1) / seconds).toFixed(1) + " tokens per second");
  if (counts.first) pieces.push("first after " + ((counts.first - counts.start) / 1000).toFixed(1) + " s");
  if (ending) pieces.push(ending);
  byId("speed").textContent = pieces.join(", ");
  // Read aloud once, at the end: not with every token.
  if (ending) byId("said").textContent = "Answer: " + pieces.join(", ");
}

const ENDINGS = { stop: "ended by itself", length: "the length was reached" };

async function readAnswer(response, counts) {
  let ending = "";
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) counts.tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) continue;
    const text = choice.text ?? choice.delta.content ?? "";
    if (choice.delta && choice.delta.role) continue;
    counts.last = performance.now();
    counts.first = counts.first || counts.last;
    counts.tokens += event.usage ? 0 : 1;
    addText(text);
    ending = ENDINGS[choice.finish_reason] || ending;
    sayCounts(counts, "");
  }
  sayCounts(counts, ending);
}

async function generate() {
  if (state.running || !state.isReady) return;
  const body = requestBody();
  const isChat = state.usesTemplate && state.task === "chat";
  const controller = new AbortController();
  const counts = { tokens: 0, start: performance.now(), first: 0, last: 0 };
  clearAnswer();
  setRunning(controller);
  try {
    const response = await fetch(state.usesTemplate ? "v1/chat/completions" : "v1/completions", {
      method: "POST", body: JSON.stringify(body), signal: controller.signal,
      headers: { "Content-Type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await readAnswer(response, counts);
    if (isChat) takeTurn(body.messages);
  } catch (error) {
    if (error.name === "AbortError") sayCounts(counts, "stopped");
    else sayTrouble(error instanceof TypeError ? "The service cannot be reached." : error.message);
  } finally {
    setRunning(null);
    byId("keep").hidden = state.usesTemplate || !state.answer;
    look();
  }
}

function takeTurn(messages) {
  state.turns = [...messages, { role: "assistant", content: state.answer }];
  byId("prompt").value = "";
  byId("answer").replaceChildren();
  showTurns();
  byId("prompt").focus();
}

// -- the service -----------------------------------------------------------------------------------------------------

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return (unit && count < 100 ? count.toFixed(1) : Math.round(count)) + " " + units[unit];
}

function setBar(id, value, most) {
  const bar = byId(id);
  bar.setAttribute("aria-valuenow", value);
  bar.setAttribute("aria-valuemax", most);
  bar.firstElementChild.style.width = (most ? Math.min(100, 100 * value / most) : 0) + "%";
}

// Tokens of all requests together since the last look.
function rateOf(numTokens) {
  const now = performance.now();
  const before = state.seen;
  state.seen = { now, numTokens };
  return before ? Math.max(0, numTokens - before.numTokens) / Math.max(0.1, (now - before.now) / 1000) : 0;
}

function showTrend(rate) {
  state.trend = [...state.trend, rate].slice(-60);
  const most = Math.max(...state.trend, 1e-9);
  const points = state.trend.map((value, index) =>
    (240 * index / 59).toFixed(1) + " " + (42 - 40 * value / most).toFixed(1));
  byId("trend").firstElementChild.setAttribute("d", "M" + points.join("L"));
}

function showStatus(status) {
  byId("model").textContent = status.model;
  document.title = status.model + " at zero";
  sayState(status.state, { loading: "loading the model", draining: "being stopped" }[status.state] || status.state);
  if (!status.queue) return;
  if (status.has_chat_template !== state.usesTemplate) {
    state.usesTemplate = status.has_chat_template;
    state.drafts = {};
    showTask();
  }
  if (status.max_tokens) byId("length").max = Math.max(1, Math.min(1024, status.max_tokens - 1));
  showSettings();
  const { queue, memory } = status;
  const rate = rateOf(status.num_new_tokens);
  byId("rate").textContent = rate >= 100 ? Math.round(rate) : rate.toFixed(1);
  showTrend(rate);
  byId("running").textContent = queue.num_rows + " of " + queue.max_rows + " rows";
  byId("waiting").textContent = queue.num_waiting + " of " + queue.max_queue;
  setBar("running-bar", queue.num_rows, queue.max_rows);
  setBar("waiting-bar", queue.num_waiting, queue.max_queue);
  byId("device").textContent = bytes(memory.device_peak_bytes) +
    (memory.device_capacity_bytes ? " of " + bytes(memory.device_capacity_bytes) : "");
  setBar("device-bar", memory.device_peak_bytes, memory.device_capacity_bytes);
  byId("on-device").textContent = bytes(memory.model_device_bytes);
  byId("on-host").textContent = bytes(memory.model_host_bytes);
  byId("on-disk").textContent = bytes(memory.model_disk_bytes);
  byId("disk-line").hidden = !memory.model_disk_bytes;
  byId("cache").textContent = bytes(memory.cache_bytes);
}

function sayState(name, text) {
  const shown = byId("state");
  if (shown.textContent !== text) shown.textContent = text;
  shown.dataset.state = name;
  state.isReady = name === "ready";
  byId("generate").disabled = state.running !== null || !state.isReady;
}

async function look() {
  try {
    const response = await fetch("status", { headers: headers() });
    byId("key-box").hidden = response.status !== 401;
    if (response.status === 401) sayState("away", "a key is needed");
    else showStatus(await response.json());
  } catch {
    sayState("away", "not reachable");
  }
}

async function keepLooking() {
  if (!document.hidden) await look();
  setTimeout(keepLooking, state.running || !state.isReady ? 1000 : 3000);
}

// -- wiring ----------------------------------------------------------------------------------------------------------

byId("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
byId("stop").addEventListener("click", () => state.running && state.running.abort());
byId("reset").addEventListener("click", reset);
byId("keep").addEventListener("click", keepAnswer);
byId("use-key").addEventListener("click", () => {
  state.key = byId("key").value.trim();
  sessionStorage.setItem("key", state.key);
  look();
});
byId("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") { event.preventDefault(); byId("use-key").click(); }
});
byId("length").addEventListener("input", showSettings);
byId("temperature").addEventListener("input", showSettings);
for (const choice of document.querySelectorAll("input[name=task]")) {
  choice.addEventListener("change", () => chooseTask(choice.value));
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  if (event.key === "Escape" && state.running) state.running.abort();
});
document.querySelector("input[name=task][value=answer]").checked = true;
showTask();
keepLooking();
