#include "base/trace_names.h"

#include <cstdio>
#include <functional>
#include <memory>

namespace bluefog {
namespace {

/// Length of the UTF-8 character that `text` begins with; 0 if it begins with none.
size_t CharacterLength(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return 1;
  const size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4 || text.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, beyond U+10FFFF.
  if ((first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) > 0x9f) ||
      (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) > 0x8f)) {
    return 0;
  }
  return length;
}

}  // namespace

std::string EscapeJson(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const size_t length = CharacterLength(text);
    const char c = text.front();
    if (length == 0) {
      out += '?';
    } else if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof(code), "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      out += text.substr(0, length);
    }
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return out;
}

TraceNames::~TraceNames() {
  for (auto& slot : slots_) delete slot.load(std::memory_order_acquire);
}

const std::string* TraceNames::Intern(std::string_view name) {
  name = name.substr(0, kMaxLength);
  const size_t hash = std::hash<std::string_view>()(name);
  std::unique_ptr<Entry> fresh;
  for (size_t probe = 0; probe < kMaxProbes; ++probe) {
    auto& slot = slots_[(hash + probe) % kSlots];
    const Entry* entry = slot.load(std::memory_order_acquire);
    if (entry == nullptr) {
      if (fresh == nullptr) fresh.reset(new Entry{std::string(name), EscapeJson(name)});
      // On failure `entry` is what another thread put there first.
      if (slot.compare_exchange_strong(entry, fresh.get(), std::memory_order_acq_rel)) {
        return &fresh.release()->escaped;
      }
    }
    if (entry->name == name) return &entry->escaped;
  }
  static const std::string& full = *new std::string("(more names)");
  return &full;
}

}  // namespace bluefog
