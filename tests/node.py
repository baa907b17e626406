"""JavaScript that programs for node share in tests."""

# Bytes that travel as text, as a widget is given them.
REVIVED = """
const revived = (value) => {
  if (Array.isArray(value)) return value.map(revived);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.base64 === "string") {
    const bytes = Buffer.from(value.base64, "base64");
    return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, revived(one)]));
};
"""
