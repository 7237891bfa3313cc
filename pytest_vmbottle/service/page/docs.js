// The page of the routes, made of the OpenAPI document.

import { ask, element, forgetToken, keepToken, token } from "/page/service.mjs";

const at = (id) => document.getElementById(id);

at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value.trim());
  at("token").value = "";
  show();
});

async function show() {
  try {
    const description = await ask("/openapi.json");
    at("login").hidden = true;
    at("message").textContent = "";
    at("version").textContent = `${description.info.title} ${description.info.version}`;
    at("main").replaceChildren(...content(description));
  } catch (error) {
    forgetToken();
    at("login").hidden = false;
    at("message").textContent = error.message;
  }
}

function* content(description) {
  for (const text of description.info.description.split("\n\n")) {
    yield paragraph(text);
  }
  yield element("h2", "Routes");
  for (const [path, operations] of Object.entries(description.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      yield route(description, path, method.toUpperCase(), operation);
    }
  }
  yield element("h2", "Objects");
  for (const [name, schema] of Object.entries(description.components.schemas)) {
    const made = element("details", "", { id: `schema-${name}` });
    made.append(summary(name), paragraph(schema.description), element("pre", JSON.stringify(schema, null, 2)));
    yield made;
  }
}

// Text in which what is between backquotes is code.
function paragraph(text = "") {
  const made = element("p");
  text.split("`").forEach((part, place) => made.append(place % 2 ? element("code", part) : part));
  return made;
}

function summary(...words) {
  const made = element("summary");
  for (const word of words) {
    made.append(element("code", word), " ");
  }
  return made;
}

function route(description, path, method, operation) {
  const made = element("details");
  const head = summary(method, path);
  head.append(element("span", operation.summary ?? ""));
  made.append(head, paragraph(operation.description), element("pre", example(description, path, method, operation)));
  const list = element("ul");
  for (const each of operation.parameters ?? []) {
    const kind = each.schema.default === undefined ? "" : ` (default: ${JSON.stringify(each.schema.default)})`;
    list.append(element("li", `${each.name}, in the ${each.in}${kind}: ${each.description ?? ""}`));
  }
  for (const [status, answer] of Object.entries(operation.responses)) {
    list.append(element("li", `${status}: ${answer.description}`));
  }
  made.append(list);
  return made;
}

function example(description, path, method, operation) {
  const filled = path.replace(/\{(\w+)\}/g, (_, name) => (name === "ids" ? "web,db" : name === "label" ? "clean" : "web"));
  const wanted = (operation.parameters ?? []).filter((each) => each.in === "query" && each.required);
  const query = wanted.map((each) => `${each.name}=/etc/hostname`).join("&");
  const words = ["curl", "-H", "'Authorization: Bearer TOKEN'"];
  if (method !== "GET") {
    words.push("-X", method);
  }
  const body = operation.requestBody?.content;
  if (body?.["application/json"]) {
    const name = body["application/json"].schema.$ref?.split("/").pop();
    const given = description.components.schemas[name]?.examples?.[0] ?? {};
    words.push("-H", "'Content-Type: application/json'", "-d", `'${JSON.stringify(given)}'`);
  } else if (body) {
    words.push("--data-binary", "@FILE");
  }
  words.push(`'${location.origin}${filled}${query ? `?${query}` : ""}'`);
  return words.join(" ");
}

if (token()) {
  show();
} else {
  at("login").hidden = false;
}
