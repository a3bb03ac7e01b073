#include "agent_protocol.h"

#include <cstring>
#include <nlohmann/json.hpp>

namespace bluefog::tools {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(HostJob, job_id, token, size, first_rank, ranks, command,
                                   program, cwd, env, tag_suffix, tag, inherit, coordinator_host,
                                   choose_host)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(HostReady, error, problem, program, coordinator)

namespace {

constexpr int kProtocol = 1;
constexpr uint32_t kMaxText = 64 << 20;  // The longest environment and command line are far less.

struct Header {
  uint32_t bytes;
  FrameKind kind;
  uint8_t unused[3];
  int32_t rank, value;
};

// CBOR: the JSON value in a form that takes names of files and tokens that are not UTF-8.
template <typename T>
std::string PackAs(const T& value) {
  const std::vector<uint8_t> bytes = nlohmann::json::to_cbor(nlohmann::json(value));
  return {bytes.begin(), bytes.end()};
}

template <typename T>
StatusOr<T> UnpackAs(const std::string& text) {
  try {
    return nlohmann::json::from_cbor(text).get<T>();
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(e.what());
  }
}

}  // namespace

std::string Pack(const Frame& frame) {
  const Header header = {
      static_cast<uint32_t>(frame.text.size()), frame.kind, {}, frame.rank, frame.value};
  return std::string(reinterpret_cast<const char*>(&header), sizeof header) + frame.text;
}

void FrameReader::Add(std::string_view bytes) {
  bytes_.erase(0, std::exchange(begin_, 0));
  bytes_ += bytes;
}

StatusOr<std::optional<Frame>> FrameReader::Next() {
  Header header;
  if (bytes_.size() - begin_ < sizeof header) return std::nullopt;
  std::memcpy(&header, bytes_.data() + begin_, sizeof header);
  if (header.kind < FrameKind::kJob || header.kind > FrameKind::kEnded || header.bytes > kMaxText) {
    return absl::InvalidArgumentError("bytes that bluefog did not send");
  }
  if (bytes_.size() - begin_ < sizeof header + header.bytes) return std::nullopt;
  Frame frame = {header.kind, header.rank, header.value,
                 bytes_.substr(begin_ + sizeof header, header.bytes)};
  begin_ += sizeof header + header.bytes;
  return frame;
}

std::string Pack(const HostJob& job) { return PackAs(job); }
std::string Pack(const HostReady& ready) { return PackAs(ready); }
StatusOr<HostJob> UnpackJob(const std::string& text) { return UnpackAs<HostJob>(text); }
StatusOr<HostReady> UnpackReady(const std::string& text) { return UnpackAs<HostReady>(text); }

std::string Greeting() {
  return kGreetingMark + std::string(BLUEFOG_VERSION) + " " + std::to_string(kProtocol);
}

}  // namespace bluefog::tools
