// Every setting, in one table (base/config.cc): name, environment variable, default, unit, what it
// does. Read once, by Config::FromEnvironment, and passed down; nothing else in the library reads
// the environment. `bluefog info --config` prints the table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog {

struct Config {
  // Engine.
  int64_t eager_bytes = 8 << 10;    ///< Up to this size data goes without waiting for a post.
  int64_t chunk_bytes = 256 << 10;  ///< Unit on the wire.
  int64_t tile_bytes = 32 << 10;    ///< Unit of combine and consume.
  int64_t bucket_bytes = 8 << 20;   ///< Parameters fused into one operation, at most.
  int64_t slot_bytes =
      2 << 20;  ///< Arena memory for staging private tensors; best if it stays in cache.
  /// A waiting caller drives at most so long without progress. This and the next are for one rank
  /// per core, and so many times as long with more.
  int64_t drive_us = 100;
  int64_t yield_limit_us = 100;  ///< A longer sched_yield means the core is wanted: block.
  int64_t no_drive_ms = 100;     ///< … and after several in a row do not drive for up to so long.
  /// "auto": shared memory where both ranks have it, UCX elsewhere. "shm" or "ucx": nothing else.
  std::string transport = "auto";
  /// Names or subnets, separated by commas. Empty: the interface that leads to the coordinator.
  std::string network_interface;
  /// How operations over several hosts move their bytes: "auto" (what takes less time by the next
  /// four), "flat" or "hierarchical".
  std::string hierarchy = "auto";
  int64_t nic_mbps = 10'000;    ///< Mbit/s of a network interface, each way.
  int64_t nic_latency_us = 50;  ///< From host to host.
  int64_t host_mbps = 80'000;   ///< Mbit/s that all ranks of a host together read from each other.
  int64_t host_latency_us = 5;  ///< Between ranks of one host.
  // Patience.
  int64_t stall_report_ms = 5'000;
  int64_t op_timeout_ms = 600'000;
  // Control plane.
  int64_t join_timeout_ms = 60'000;
  int64_t heartbeat_ms = 200;
  int64_t suspect_ms = 1'000;
  int64_t dead_ms = 2'000;
  // Observation.
  std::string log_level = "info";  ///< trace, debug, info, warn, error, off.
  bool log_hide_time = false;
  std::string timeline;    ///< Prefix of the per-rank trace files; empty: off.
  std::string failpoints;  ///< "name=action[@count];…", for tests.
  // Where the components lie; empty: beside libbluefog.so.
  std::string component_dir;

  // The place in the job as a launcher gave it; empty or -1 where it did not.
  std::string job_id, coordinator;  ///< coordinator: host:port of the control plane.
  int rank = -1, size = -1, local_rank = -1, local_size = -1;
  std::string token_file;     ///< Where the job token lies; the token itself is in no setting.
  int token_fd = -1;          ///< The same as an inherited descriptor.
  int nodes_per_machine = 0;  ///< BLUEFOG_NODES_PER_MACHINE.

  // torchrun's variables, as they are.
  int torch_rank = -1, torch_world_size = -1, torch_local_rank = -1, torch_local_world_size = -1;
  std::string torch_master_addr;
  int torch_master_port = -1;

  /// InvalidArgument names the variable, its value and what is expected.
  static StatusOr<Config> FromEnvironment();
  /// What must be equal on all ranks: sizes and limits of the data path.
  std::string FingerprintText() const;
};

/// One row of the table, as `bluefog info --config` prints it.
struct SettingInfo {
  std::string variable, type, default_value, value, help;
};
StatusOr<std::vector<SettingInfo>> DescribeConfig(const Config& config);

}  // namespace bluefog
