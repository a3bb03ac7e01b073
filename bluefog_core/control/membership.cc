// Joins a job through the control component and hands its events to the core; a rank that is alone
// gets a Membership without any of it.
#include "control/membership.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/component.h"
#include "base/failpoint.h"
#include "base/hash.h"
#include "base/log.h"
#include "control/control_abi.h"

namespace bluefog::control {
namespace {

class AloneMembership final : public Membership {
 public:
  explicit AloneMembership(const std::string& address) : addresses_{address} {}
  const std::vector<std::string>& addresses() const override { return addresses_; }
  void ReportFailure(int, const std::string&) override {}
  void Leave() override {}
  int64_t messages() const override { return 0; }

 private:
  const std::vector<std::string> addresses_;
};

class ComponentMembership final : public Membership {
 public:
  ComponentMembership(const bluefog_control_api* api, MembershipEvents events)
      : api_(api), events_(std::move(events)), pid_(getpid()) {}
  ~ComponentMembership() override {
    if (!forked()) api_->destroy(control_);
  }

  Status Join(const Place& place, const Config& config, const std::string& address) {
    const std::string fingerprint_text = "version=" BLUEFOG_VERSION " " + config.FingerprintText();
    auto ms = [](int64_t value) {
      return static_cast<int32_t>(std::min<int64_t>(value, INT32_MAX));
    };
    bluefog_control_options options = {};
    options.struct_size = sizeof(options);
    options.job_id = place.job_id.c_str();
    options.rank = place.rank;
    options.size = place.size;
    options.embed_server = place.rank == 0;
    options.coordinator = place.coordinator.c_str();
    options.token = place.token.data();
    options.token_bytes = static_cast<int64_t>(place.token.size());
    options.launcher_reports = place.launched_by == "bluefog run";
    options.address = address.data();
    options.address_bytes = static_cast<int64_t>(address.size());
    options.fingerprint = StableHash().Add(fingerprint_text).value();
    options.fingerprint_text = fingerprint_text.c_str();
    options.join_timeout_ms = ms(config.join_timeout_ms);
    options.heartbeat_ms = ms(config.heartbeat_ms);
    options.suspect_ms = ms(config.suspect_ms);
    options.dead_ms = ms(config.dead_ms);
    options.events = {.user = this,
                      .rank_failed = RankFailed,
                      .rank_left = RankLeft,
                      .progress = Progress,
                      .notice = Notice,
                      .interrupted = Interrupted};
    std::vector<char> text(64 << 10);
    bluefog_control_error error = {0, text.data(), static_cast<int64_t>(text.size())};
    if (FailpointHit("control.join")) {
      return absl::InternalError("rank " + std::to_string(place.rank) + ": failpoint control.join");
    }
    rank_ = place.rank;
    control_ = api_->join(&options, &error);
    if (control_ == nullptr) {
      return Status(static_cast<absl::StatusCode>(error.code),
                    "rank " + std::to_string(place.rank) + " cannot join: " + text.data());
    }
    for (int rank = 0; rank < place.size; ++rank) {
      int64_t bytes = 0;
      const void* data = api_->address(control_, rank, &bytes);
      addresses_.emplace_back(static_cast<const char*>(data), static_cast<size_t>(bytes));
    }
    return absl::OkStatus();
  }

  const std::vector<std::string>& addresses() const override { return addresses_; }
  void ReportFailure(int rank, const std::string& text) override {
    if (!forked()) api_->report_failure(control_, rank, text.c_str());
  }
  void Leave() override {
    if (!forked()) api_->leave(control_);
  }
  int64_t messages() const override {
    int64_t messages = 0, heartbeats = 0;
    if (!forked()) api_->counters(control_, &messages, &heartbeats);
    return messages;
  }

 private:
  // gRPC does not survive a fork: its threads are gone and its locks may be held for ever.
  bool forked() const { return getpid() != pid_; }

  static ComponentMembership& Self(void* user) { return *static_cast<ComponentMembership*>(user); }
  static void RankFailed(void* user, int32_t rank, const char* text) {
    if (Self(user).events_.rank_failed) Self(user).events_.rank_failed(rank, text);
  }
  static void RankLeft(void* user, int32_t rank) {
    if (Self(user).events_.rank_left) Self(user).events_.rank_left(rank);
  }
  static int64_t Progress(void* user) {
    if (FailpointHit("control.heartbeat")) {
      const int rank = Self(user).rank_;
      RankFailed(user, rank,
                 ("rank " + std::to_string(rank) + ": failpoint control.heartbeat").c_str());
    }
    return Self(user).events_.progress ? Self(user).events_.progress() : 0;
  }
  static void Notice(void*, const char* text) { BLUEFOG_LOG(kWarning) << text; }
  static int32_t Interrupted(void* user) {
    return Self(user).events_.interrupted && Self(user).events_.interrupted();
  }

  const bluefog_control_api* const api_;
  const MembershipEvents events_;
  const pid_t pid_;
  int rank_ = -1;
  bluefog_control* control_ = nullptr;
  std::vector<std::string> addresses_;
};

StatusOr<const bluefog_control_api*> LoadApi(const Config& config) {
  StatusOr<void*> symbol =
      LoadComponentSymbol("control", "bluefog_control_factory", config.component_dir);
  if (!symbol.ok()) return symbol.status();
  const auto factory = reinterpret_cast<const bluefog_control_api* (*)()>(*symbol);
  const bluefog_control_api* api = factory();
  if (api->abi_version != BLUEFOG_CONTROL_ABI_VERSION || api->struct_size < sizeof(*api)) {
    return absl::FailedPreconditionError("libbluefog_control.so speaks version " +
                                         std::to_string(api->abi_version) +
                                         " of its interface and this library version " +
                                         std::to_string(BLUEFOG_CONTROL_ABI_VERSION) +
                                         ": both must come from the same installation");
  }
  return api;
}

}  // namespace

StatusOr<std::unique_ptr<Membership>> Membership::Join(const Place& place, const Config& config,
                                                       const std::string& address,
                                                       MembershipEvents events) {
  if (place.size == 1) return std::make_unique<AloneMembership>(address);
  StatusOr<const bluefog_control_api*> api = LoadApi(config);
  if (!api.ok()) return api.status();
  auto membership = std::make_unique<ComponentMembership>(*api, std::move(events));
  if (Status s = membership->Join(place, config, address); !s.ok()) return s;
  return membership;
}

Status ReportDeath(const Place& place, const Config& config, int rank, const std::string& text,
                   int timeout_ms) {
  StatusOr<const bluefog_control_api*> api = LoadApi(config);
  if (!api.ok()) return api.status();
  bluefog_control_death death = {};
  death.struct_size = sizeof(death);
  death.job_id = place.job_id.c_str();
  death.coordinator = place.coordinator.c_str();
  death.token = place.token.data();
  death.token_bytes = static_cast<int64_t>(place.token.size());
  death.rank = rank;
  death.timeout_ms = timeout_ms;
  death.text = text.c_str();
  std::vector<char> why(4 << 10);
  bluefog_control_error error = {0, why.data(), static_cast<int64_t>(why.size())};
  (*api)->report_death(&death, &error);
  return Status(static_cast<absl::StatusCode>(error.code), why.data());
}

}  // namespace bluefog::control
