// The service, as the pages use it. The token is kept as long as the browser's tab; it is in no URL and no cookie.

const KEY = "vmbottle.token";

export const token = () => sessionStorage.getItem(KEY) ?? "";
export const keepToken = (value) => sessionStorage.setItem(KEY, value);
export const forgetToken = () => sessionStorage.removeItem(KEY);

export class Refusal extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export async function ask(path, { method = "GET", body } = {}) {
  const headers = { Authorization: `Bearer ${token()}` };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
  }
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store" });
  const kind = answer.headers.get("Content-Type") ?? "";
  const content = kind.includes("json") ? await answer.json() : await answer.text();
  if (!answer.ok) {
    throw new Refusal(answer.status, content.detail ?? `HTTP status ${answer.status}`);
  }
  return content;
}

export function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  // Always as text: names, reasons and consoles may be a guest's.
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  return made;
}
