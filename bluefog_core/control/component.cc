// The component's one symbol: control_abi.h over Server and Client. No exception leaves it.
#include <google/protobuf/stubs/common.h>
#include <grpcpp/create_channel_posix.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "base/clock.h"
#include "control/client.h"
#include "control/control_abi.h"
#include "control/server.h"

struct bluefog_control {
  std::unique_ptr<bluefog::control::Server> server;  // Rank 0 only. Outlives the client.
  std::unique_ptr<bluefog::control::Client> client;
};

namespace bluefog::control {
namespace {

constexpr int64_t kMaxAddressBytes = 64 << 10;
constexpr size_t kMaxFingerprintText = 16 << 10;
constexpr int kMaxRanks = 1 << 16;

void SetError(bluefog_control_error* error, const Status& status) {
  error->code = static_cast<int32_t>(status.code());
  if (error->capacity <= 0) return;
  const absl::string_view text =
      status.message().substr(0, static_cast<size_t>(error->capacity - 1));
  *std::copy(text.begin(), text.end(), error->text) = '\0';
}

std::string ThisProcess() {
  char host[256] = "";
  gethostname(host, sizeof(host) - 1);
  return "process " + std::to_string(getpid()) + " on " + host;
}

Status Check(const bluefog_control_options& o) {
  if (o.struct_size < sizeof(o)) {
    return absl::FailedPreconditionError("bluefog_control_options of an older version");
  }
  if (o.size < 1 || o.size > kMaxRanks || o.rank < 0) {
    return absl::InvalidArgumentError("rank " + std::to_string(o.rank) + " of " +
                                      std::to_string(o.size) + " ranks cannot be");
  }
  if (o.address_bytes < 0 || o.address_bytes > kMaxAddressBytes) {
    return absl::InvalidArgumentError("an address of " + std::to_string(o.address_bytes) +
                                      " bytes is longer than " + std::to_string(kMaxAddressBytes));
  }
  if (o.heartbeat_ms < 1 || o.dead_ms < 2 * int64_t{o.heartbeat_ms}) {
    return absl::InvalidArgumentError("BLUEFOG_HEARTBEAT_MS is " + std::to_string(o.heartbeat_ms) +
                                      " and BLUEFOG_DEAD_MS is " + std::to_string(o.dead_ms) +
                                      ": the second must be at least twice the first");
  }
  return absl::OkStatus();
}

std::string Token(const void* token, int64_t bytes) {
  return std::string(static_cast<const char*>(token), static_cast<size_t>(bytes));
}

StatusOr<std::unique_ptr<bluefog_control>> Join(const bluefog_control_options& o) {
  if (Status s = Check(o); !s.ok()) return s;
  const bluefog_control_events events = o.events;
  auto notice = [events](const std::string& text) { events.notice(events.user, text.c_str()); };

  ClientOptions client;
  client.coordinator = o.coordinator;
  client.caller = {o.job_id, o.rank, Token(o.token, o.token_bytes)};
  client.join.set_rank(o.rank);
  client.join.set_size(o.size);
  client.join.set_address(o.address, static_cast<size_t>(o.address_bytes));
  client.join.set_fingerprint(o.fingerprint);
  client.join.set_fingerprint_text(std::string(o.fingerprint_text).substr(0, kMaxFingerprintText));
  client.join.set_timeout_ms(o.join_timeout_ms);
  client.join.set_process(ThisProcess());
  client.join.set_launcher_reports(o.launcher_reports != 0);
  client.serves = o.embed_server != 0;
  client.heartbeat_ms = o.heartbeat_ms;
  client.suspect_ms = o.suspect_ms;
  client.dead_ms = o.dead_ms;
  client.rank_failed = [events](int rank, const std::string& text) {
    events.rank_failed(events.user, rank, text.c_str());
  };
  client.rank_left = [events](int rank) { events.rank_left(events.user, rank); };
  client.progress = [events] { return events.progress(events.user); };
  client.interrupted = [events] { return events.interrupted(events.user) != 0; };
  client.notice = notice;

  auto control = std::make_unique<bluefog_control>();
  if (o.embed_server) {
    StatusOr<std::unique_ptr<Server>> server = Server::Start({.coordinator = o.coordinator,
                                                              .job_id = o.job_id,
                                                              .token = client.caller.token,
                                                              .rank = o.rank,
                                                              .size = o.size,
                                                              .heartbeat_ms = o.heartbeat_ms,
                                                              .suspect_ms = o.suspect_ms,
                                                              .dead_ms = o.dead_ms,
                                                              .notice = notice});
    if (!server.ok()) return server.status();
    control->server = *std::move(server);
  }
  control->client = std::make_unique<Client>(client);
  Status joined = control->client->Join();
  if (!joined.ok()) {
    control->client.reset();
    if (control->server) control->server->Close();  // The others are told why before it ends.
    return joined;
  }
  return control;
}

Status ReportDeath(const bluefog_control_death& d) {
  if (d.struct_size < sizeof(d)) {
    return absl::FailedPreconditionError("bluefog_control_death of an older version");
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(d.timeout_ms);
  const Caller caller = {d.job_id, -1, Token(d.token, d.token_bytes)};
  StatusOr<int> fd =
      Dial(d.coordinator, caller, NowNs() + d.timeout_ms * kMillisecond, [] { return false; });
  if (!fd.ok()) return fd.status();
  auto channel =
      grpc::CreateCustomInsecureChannelFromFd("bluefog-control", *fd, grpc::ChannelArguments());
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       (deadline - std::chrono::steady_clock::now()));
  v1::Death death;
  death.set_rank(d.rank);
  death.set_text(d.text);
  v1::Told told;
  const grpc::Status end = v1::Control::NewStub(channel)->ReportDeath(&context, death, &told);
  return Status(static_cast<absl::StatusCode>(end.error_code()), end.error_message());
}

/// Runs `f`; what it throws (no memory, no thread) is returned as a Status.
template <typename F>
Status NoThrow(F f) {
  try {
    return f();
  } catch (const std::exception& e) {
    return absl::ResourceExhaustedError(e.what());
  } catch (...) {
    return absl::InternalError("unknown exception");
  }
}

bluefog_control* AbiJoin(const bluefog_control_options* options, bluefog_control_error* error) {
  std::unique_ptr<bluefog_control> control;
  const Status status = NoThrow([&]() -> Status {
    StatusOr<std::unique_ptr<bluefog_control>> joined = Join(*options);
    if (!joined.ok()) return joined.status();
    control = *std::move(joined);
    return absl::OkStatus();
  });
  SetError(error, status);
  return control.release();
}

const void* AbiAddress(bluefog_control* control, int32_t rank, int64_t* bytes) {
  const std::vector<std::string>& book = control->client->addresses();
  *bytes = 0;
  if (rank < 0 || static_cast<size_t>(rank) >= book.size()) return nullptr;
  *bytes = static_cast<int64_t>(book[static_cast<size_t>(rank)].size());
  return book[static_cast<size_t>(rank)].data();
}

void AbiReportFailure(bluefog_control* control, int32_t rank, const char* text) {
  (void)NoThrow([&] {
    control->client->ReportFailure(rank, text);
    return absl::OkStatus();
  });
}

void AbiLeave(bluefog_control* control) {
  (void)NoThrow([&] {
    control->client->Leave();
    if (control->server) control->server->Close();
    return absl::OkStatus();
  });
}

void AbiDestroy(bluefog_control* control) {
  (void)NoThrow([&] {
    delete control;
    return absl::OkStatus();
  });
}

void AbiCounters(bluefog_control* control, int64_t* messages, int64_t* heartbeats) {
  *messages = control->client->messages() + (control->server ? control->server->messages() : 0);
  *heartbeats = control->client->heartbeats();
}

void AbiReportDeath(const bluefog_control_death* death, bluefog_control_error* error) {
  SetError(error, NoThrow([&] { return ReportDeath(*death); }));
}

const char* AbiDescribe() {
  static const std::string* const text =
      new std::string("gRPC " + grpc::Version() + ", protobuf " +
                      google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
  return text->c_str();
}

}  // namespace
}  // namespace bluefog::control

extern "C" const bluefog_control_api* bluefog_control_factory(void) {
  static const bluefog_control_api api = {
      .struct_size = sizeof(bluefog_control_api),
      .abi_version = BLUEFOG_CONTROL_ABI_VERSION,
      .join = bluefog::control::AbiJoin,
      .address = bluefog::control::AbiAddress,
      .report_failure = bluefog::control::AbiReportFailure,
      .leave = bluefog::control::AbiLeave,
      .destroy = bluefog::control::AbiDestroy,
      .counters = bluefog::control::AbiCounters,
      .report_death = bluefog::control::AbiReportDeath,
      .describe = bluefog::control::AbiDescribe,
  };
  return &api;
}
