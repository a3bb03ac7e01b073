// The one table of settings, and the only place that reads the environment. A default is written
// once, in the struct. Several variables may name one field (BlueFog's names beside ours): the
// later row wins.
#include <bluefog/config.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>
#include <variant>

#include "base/config_table.h"
#include "base/log.h"

namespace bluefog {
namespace {

enum class Kind {
  kSize,
  kMs,
  kUs,
  kNumber,
  kFlag,
  kLevel,
  kTransport,
  kHierarchy,
  kHostPort,
  kText,
  kIgnored
};

using Field = std::variant<std::monostate, int64_t Config::*, int Config::*, bool Config::*,
                           std::string Config::*>;

struct Setting {
  const char* variable;
  Field field;
  Kind kind;
  int64_t min, max;
  const char* help;
};

constexpr int64_t kKi = 1 << 10, kMi = 1 << 20, kGi = 1 << 30;
constexpr int64_t kMaxMs =
    int64_t{7} * 24 * 3600 * 1000;  // A week; also fits the int32 of the C ABI.
constexpr int64_t kMaxRanks = 1 << 20;

const Setting kSettings[] = {
    {"BLUEFOG_EAGER_BYTES", &Config::eager_bytes, Kind::kSize, 0, 128 * kKi,
     "messages up to this size leave without waiting for the receiver's post; equal on all ranks"},
    {"BLUEFOG_CHUNK_BYTES", &Config::chunk_bytes, Kind::kSize, kKi, kGi,
     "unit on the wire; equal on all ranks"},
    {"BLUEFOG_TILE_BYTES", &Config::tile_bytes, Kind::kSize, 256, kGi,
     "unit of combine and consume, should fit the L1 or L2 cache"},
    {"BLUEFOG_FUSION_THRESHOLD", &Config::bucket_bytes, Kind::kSize, 0, 1024 * kGi,
     "BlueFog's name of BLUEFOG_BUCKET_BYTES, which wins where both are set"},
    {"BLUEFOG_BUCKET_BYTES", &Config::bucket_bytes, Kind::kSize, 0, 1024 * kGi,
     "parameters fused into one operation, at most; 0: each parameter alone; equal on all ranks"},
    {"BLUEFOG_SLOT_BYTES", &Config::slot_bytes, Kind::kSize, 64 * kKi, 1024 * kGi,
     "shared memory for staging tensors that do not lie in the arena"},
    {"BLUEFOG_DRIVE_US", &Config::drive_us, Kind::kUs, 0, 1'000'000,
     "a waiting caller drives the engine at most so long without progress, times the ranks per "
     "core, before it blocks"},
    {"BLUEFOG_YIELD_LIMIT_US", &Config::yield_limit_us, Kind::kUs, 1, 1'000'000,
     "a sched_yield that takes longer, times the ranks per core, means that the core is wanted: "
     "block"},
    {"BLUEFOG_NO_DRIVE_MS", &Config::no_drive_ms, Kind::kMs, 0, kMaxMs,
     "after such yields, one after the other, do not drive for up to this time"},
    {"BLUEFOG_TRANSPORT", &Config::transport, Kind::kTransport, 0, 0,
     "how ranks reach each other: auto is shared memory where both have it and UCX elsewhere; "
     "equal "
     "on all ranks"},
    {"BLUEFOG_NETWORK_INTERFACE", &Config::network_interface, Kind::kText, 0, 0,
     "what carries messages between hosts: names of interfaces or subnets (10.1.0.0/16), separated "
     "by commas; empty: the one that leads to the coordinator, or what UCX_NET_DEVICES or UCX_TLS "
     "ask for"},
    {"BLUEFOG_HIERARCHY", &Config::hierarchy, Kind::kHierarchy, 0, 0,
     "how allreduce and hierarchical_neighbor_allreduce move their bytes between hosts: auto is "
     "what takes less time by the next four settings; equal on all ranks, like these"},
    {"BLUEFOG_NIC_MBPS", &Config::nic_mbps, Kind::kNumber, 1, 100'000'000,
     "Mbit/s of a network interface, each way; the ranks that use it share it"},
    {"BLUEFOG_NIC_LATENCY_US", &Config::nic_latency_us, Kind::kUs, 0, 60'000'000,
     "time of a small message from host to host"},
    {"BLUEFOG_HOST_MBPS", &Config::host_mbps, Kind::kNumber, 1, 100'000'000,
     "Mbit/s that all ranks of a host together read from each other"},
    {"BLUEFOG_HOST_LATENCY_US", &Config::host_latency_us, Kind::kUs, 0, 60'000'000,
     "time of a small message between ranks of a host"},
    {"BLUEFOG_STALL_REPORT_MS", &Config::stall_report_ms, Kind::kMs, 1, kMaxMs,
     "an operation without its partner is reported after this time"},
    {"BLUEFOG_OP_TIMEOUT_MS", &Config::op_timeout_ms, Kind::kMs, 1, kMaxMs,
     "an operation fails after this time while its partner lives but does not submit it"},
    {"BLUEFOG_JOIN_TIMEOUT_MS", &Config::join_timeout_ms, Kind::kMs, 1, kMaxMs,
     "init() fails when not all ranks have joined after this time"},
    {"BLUEFOG_HEARTBEAT_MS", &Config::heartbeat_ms, Kind::kMs, 1, kMaxMs,
     "time between heartbeats"},
    {"BLUEFOG_SUSPECT_MS", &Config::suspect_ms, Kind::kMs, 1, kMaxMs,
     "a rank that is silent for so long is suspected"},
    {"BLUEFOG_DEAD_MS", &Config::dead_ms, Kind::kMs, 1, kMaxMs,
     "a rank that is silent for so long counts as dead"},
    {"BLUEFOG_LOG_LEVEL", &Config::log_level, Kind::kLevel, 0, 0, "least severity that is logged"},
    {"BLUEFOG_LOG_HIDE_TIME", &Config::log_hide_time, Kind::kFlag, 0, 0,
     "log lines without date and time"},
    {"BLUEFOG_TIMELINE", &Config::timeline, Kind::kText, 0, 0,
     "write a Chrome trace to <value><rank>.json; the folder must exist; empty: off"},
    {"BLUEFOG_FAILPOINTS", &Config::failpoints, Kind::kText, 0, 0,
     "for tests: \"name=action[@n]; ...\" with action kill, stop, error or sleep:MS"},
    {"BLUEFOG_COMPONENT_DIR", &Config::component_dir, Kind::kText, 0, 0,
     "where libbluefog_<component>.so lie; empty: beside libbluefog.so, then the loader's path"},
    {"BLUEFOG_TOKEN_FILE", &Config::token_file, Kind::kText, 0, 0,
     "file with the job token (64 hexadecimal digits or 32 bytes, mode 600), the same on all "
     "ranks; "
     "needed where the control plane can be reached from the network"},
    {"BLUEFOG_NODES_PER_MACHINE", &Config::nodes_per_machine, Kind::kNumber, 0, kMaxRanks,
     "let one host look like several with so many ranks each; 0: hosts as they are"},
    {"BLUEFOG_CYCLE_TIME",
     {},
     Kind::kIgnored,
     0,
     0,
     "BlueFog's negotiation cycle: accepted, no effect, since there is no negotiation"},
    // Set by `bluefog run`.
    {"BLUEFOG_JOB_ID", &Config::job_id, Kind::kText, 0, 0, "set by the launcher: name of the job"},
    {"BLUEFOG_COORDINATOR", &Config::coordinator, Kind::kHostPort, 0, 0,
     "set by the launcher: where the control plane listens"},
    {"BLUEFOG_TOKEN_FD", &Config::token_fd, Kind::kNumber, 0, 1 << 30,
     "set by the launcher: inherited descriptor of a file that holds the job token"},
    {"BLUEFOG_RANK", &Config::rank, Kind::kNumber, 0, kMaxRanks - 1,
     "set by the launcher: this rank"},
    {"BLUEFOG_SIZE", &Config::size, Kind::kNumber, 1, kMaxRanks,
     "set by the launcher: ranks in the job"},
    {"BLUEFOG_LOCAL_RANK", &Config::local_rank, Kind::kNumber, 0, kMaxRanks - 1,
     "set by the launcher: this rank among those of its host"},
    {"BLUEFOG_LOCAL_SIZE", &Config::local_size, Kind::kNumber, 1, kMaxRanks,
     "set by the launcher: ranks on this host"},
    // Set by torchrun.
    {"RANK", &Config::torch_rank, Kind::kNumber, 0, kMaxRanks - 1, "set by torchrun: this rank"},
    {"WORLD_SIZE", &Config::torch_world_size, Kind::kNumber, 1, kMaxRanks,
     "set by torchrun: ranks in the job"},
    {"LOCAL_RANK", &Config::torch_local_rank, Kind::kNumber, 0, kMaxRanks - 1,
     "set by torchrun: this rank among those of its host"},
    {"LOCAL_WORLD_SIZE", &Config::torch_local_world_size, Kind::kNumber, 1, kMaxRanks,
     "set by torchrun: ranks on this host"},
    {"MASTER_ADDR", &Config::torch_master_addr, Kind::kText, 0, 0,
     "set by torchrun: host of rank 0"},
    {"MASTER_PORT", &Config::torch_master_port, Kind::kNumber, 1, 65535,
     "set by torchrun: port on that host"},
};

/// 524288 → "512K": the form in which a size may be given.
std::string FormatSize(int64_t bytes) {
  for (const auto& [unit, suffix] : {std::pair{kGi, 'G'}, {kMi, 'M'}, {kKi, 'K'}}) {
    if (bytes != 0 && bytes % unit == 0) return std::to_string(bytes / unit) + suffix;
  }
  return std::to_string(bytes);
}

/// Decimal digits only; for sizes one suffix K, M or G. False on anything else and on overflow.
bool ParseNumber(std::string_view text, bool suffix_allowed, int64_t* out) {
  int64_t unit = 1;
  if (suffix_allowed && !text.empty()) {
    switch (text.back()) {
      case 'K':
      case 'k':
        unit = kKi;
        break;
      case 'M':
      case 'm':
        unit = kMi;
        break;
      case 'G':
      case 'g':
        unit = kGi;
        break;
      default:
        break;
    }
    if (unit != 1) text.remove_suffix(1);
  }
  if (text.empty()) return false;
  int64_t value = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return false;
    if (__builtin_mul_overflow(value, int64_t{10}, &value)) return false;
    if (__builtin_add_overflow(value, int64_t{c - '0'}, &value)) return false;
  }
  return !__builtin_mul_overflow(value, unit, out);
}

bool ParseFlag(std::string_view text, bool* out) {
  constexpr std::string_view kYes[] = {"1", "true", "True", "TRUE", "yes", "on"};
  constexpr std::string_view kNo[] = {"0", "false", "False", "FALSE", "no", "off"};
  *out = std::find(std::begin(kYes), std::end(kYes), text) != std::end(kYes);
  return *out || std::find(std::begin(kNo), std::end(kNo), text) != std::end(kNo);
}

bool IsHostPort(std::string_view text) {
  const size_t colon = text.rfind(':');
  int64_t port = 0;
  return colon != std::string_view::npos && colon > 0 &&
         ParseNumber(text.substr(colon + 1), false, &port) && port >= 1 && port <= 65535;
}

std::string TypeOf(const Setting& s) {
  switch (s.kind) {
    case Kind::kSize:
      return "size";
    case Kind::kMs:
      return "ms";
    case Kind::kUs:
      return "us";
    case Kind::kNumber:
      return "number";
    case Kind::kFlag:
      return "flag";
    case Kind::kLevel:
      return "level";
    case Kind::kTransport:
      return "transport";
    case Kind::kHierarchy:
      return "form";
    case Kind::kHostPort:
      return "host:port";
    case Kind::kText:
      return "text";
    case Kind::kIgnored:
      return "ignored";
  }
  return "";
}

std::string Expected(const Setting& s) {
  const auto range = [&](const std::string& what, auto format) {
    return what + " from " + format(s.min) + " to " + format(s.max);
  };
  const auto decimal = [](int64_t v) { return std::to_string(v); };
  switch (s.kind) {
    case Kind::kSize:
      return range("a number of bytes (suffixes K, M, G: powers of 1024)", FormatSize);
    case Kind::kMs:
      return range("a whole number of milliseconds", decimal);
    case Kind::kUs:
      return range("a whole number of microseconds", decimal);
    case Kind::kNumber:
      return range("a whole number", decimal);
    case Kind::kFlag:
      return "1, true, yes, on or 0, false, no, off";
    case Kind::kLevel:
      return "trace, debug, info, warn, error or off";
    case Kind::kTransport:
      return "auto, shm or ucx";
    case Kind::kHierarchy:
      return "auto, flat or hierarchical";
    case Kind::kHostPort:
      return "host:port with a port from 1 to 65535";
    case Kind::kText:
    case Kind::kIgnored:
      return "text";
  }
  return "";
}

/// False if `text` is not what the setting expects.
bool Assign(const Setting& s, std::string_view text, Config* config) {
  switch (s.kind) {
    case Kind::kSize:
    case Kind::kMs:
    case Kind::kUs:
    case Kind::kNumber: {
      int64_t value = 0;
      if (!ParseNumber(text, s.kind == Kind::kSize, &value)) return false;
      if (value < s.min || value > s.max) return false;
      if (const auto* wide = std::get_if<int64_t Config::*>(&s.field)) {
        config->*(*wide) = value;
      } else {
        config->*std::get<int Config::*>(s.field) = static_cast<int>(value);
      }
      return true;
    }
    case Kind::kFlag:
      return ParseFlag(text, &(config->*std::get<bool Config::*>(s.field)));
    case Kind::kLevel: {
      const auto level = ParseLogLevel(std::string(text));
      if (level) config->*std::get<std::string Config::*>(s.field) = NameOf(*level);
      return level.has_value();
    }
    case Kind::kTransport:
      if (text != "auto" && text != "shm" && text != "ucx") return false;
      config->*std::get<std::string Config::*>(s.field) = text;
      return true;
    case Kind::kHierarchy:
      if (text != "auto" && text != "flat" && text != "hierarchical") return false;
      config->*std::get<std::string Config::*>(s.field) = text;
      return true;
    case Kind::kHostPort:
    case Kind::kText:
      if (s.kind == Kind::kHostPort && !IsHostPort(text)) return false;
      config->*std::get<std::string Config::*>(s.field) = text;
      return true;
    case Kind::kIgnored:
      return true;
  }
  return false;
}

std::string ValueOf(const Setting& s, const Config& config) {
  struct Visitor {
    const Setting& s;
    const Config& config;
    std::string operator()(std::monostate) const { return ""; }
    std::string operator()(int64_t Config::*field) const {
      return s.kind == Kind::kSize ? FormatSize(config.*field) : std::to_string(config.*field);
    }
    std::string operator()(int Config::*field) const {
      return config.*field < 0 ? "" : std::to_string(config.*field);
    }
    std::string operator()(bool Config::*field) const { return config.*field ? "1" : "0"; }
    std::string operator()(std::string Config::*field) const { return config.*field; }
  };
  return std::visit(Visitor{s, config}, s.field);
}

}  // namespace

StatusOr<Config> ReadConfig(const VariableLookup& lookup) {
  Config config;
  for (const Setting& s : kSettings) {
    const char* text = lookup(s.variable);
    if (text == nullptr || *text == '\0') continue;  // Shells and job files unset by emptying.
    if (!Assign(s, text, &config)) {
      return absl::InvalidArgumentError("environment variable " + std::string(s.variable) + "=" +
                                        text + ": expected " + Expected(s));
    }
  }
  if (config.heartbeat_ms >= config.suspect_ms || config.suspect_ms > config.dead_ms) {
    return absl::InvalidArgumentError(
        "BLUEFOG_HEARTBEAT_MS=" + std::to_string(config.heartbeat_ms) +
        " must be below BLUEFOG_SUSPECT_MS=" + std::to_string(config.suspect_ms) +
        ", and that at most BLUEFOG_DEAD_MS=" + std::to_string(config.dead_ms) +
        ": otherwise living ranks are declared dead");
  }
  if (config.dead_ms < 2 * config.heartbeat_ms) {
    return absl::InvalidArgumentError(
        "BLUEFOG_DEAD_MS=" + std::to_string(config.dead_ms) +
        " must be at least twice BLUEFOG_HEARTBEAT_MS=" + std::to_string(config.heartbeat_ms) +
        ": otherwise one late heartbeat is a death");
  }
  return config;
}

StatusOr<Config> Config::FromEnvironment() {
  return ReadConfig([](const char* variable) { return std::getenv(variable); });
}

std::string Config::FingerprintText() const {
  return "eager_bytes=" + std::to_string(eager_bytes) +
         " chunk_bytes=" + std::to_string(chunk_bytes) +
         " bucket_bytes=" + std::to_string(bucket_bytes) + " transport=" + transport +
         " hierarchy=" + hierarchy + " nic_mbps=" + std::to_string(nic_mbps) +
         " nic_latency_us=" + std::to_string(nic_latency_us) +
         " host_mbps=" + std::to_string(host_mbps) +
         " host_latency_us=" + std::to_string(host_latency_us) +
         " nodes_per_machine=" + std::to_string(nodes_per_machine);
}

StatusOr<std::vector<SettingInfo>> DescribeConfig(const Config& config) {
  const Config defaults;
  std::vector<SettingInfo> rows;
  for (const Setting& s : kSettings) {
    const std::string expected = Expected(s);
    rows.push_back({s.variable, TypeOf(s), ValueOf(s, defaults), ValueOf(s, config),
                    s.help + (expected == "text" ? "" : " (" + expected + ")")});
  }
  return rows;
}

}  // namespace bluefog
