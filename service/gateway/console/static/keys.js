// The keys that the user typed: this tab's memory only, and sent as a header only.

const NAMES = { api: "coe-api-key", admin: "coe-admin-key" };
const kept = {};

export function key(kind) {
  if (kind in kept) return kept[kind];
  try { return sessionStorage.getItem(NAMES[kind]) || ""; } catch { return ""; }
}

export function setKey(kind, value) {
  kept[kind] = value;
  try {
    if (value) sessionStorage.setItem(NAMES[kind], value);
    else sessionStorage.removeItem(NAMES[kind]);
  } catch { /* storage is forbidden: memory will do */ }
}

export function bearer(...kinds) {
  const found = kinds.map(key).find(Boolean);
  return found ? { authorization: `Bearer ${found}` } : {};
}
