// The component: UCX behind the border of ucx_abi.h, and nothing else. One worker, one kind of
// active message, endpoints with error handling.
#include <ucp/api/ucp.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "transport/ucx/ucx_abi.h"

struct bluefog_ucx_peer {
  bluefog_ucx* ucx = nullptr;
  ucp_ep_h endpoint = nullptr;
  void* user = nullptr;
  bool down = false;
  int pending = 0;  ///< Sends that UCX has kept.
};

struct bluefog_ucx {
  bluefog_ucx_events events;
  std::vector<std::unique_ptr<bluefog_ucx_peer>> peers;  ///< Also after their end: UCX may be late.
  ucp_context_h context = nullptr;
  ucp_worker_h worker = nullptr;
  ucp_address_t* address = nullptr;
  size_t address_bytes = 0;
  int fd = -1;
};

namespace {

constexpr unsigned kMessageId = 17;
constexpr int kClosingTurns = 100'000;

int32_t ResultOf(ucs_status_t status) {
  switch (status) {
    case UCS_OK:
      return BLUEFOG_UCX_DONE;
    case UCS_INPROGRESS:
      return BLUEFOG_UCX_PENDING;
    case UCS_ERR_UNREACHABLE:
    case UCS_ERR_REJECTED:
    case UCS_ERR_NOT_CONNECTED:
    case UCS_ERR_INVALID_ADDR:
      return BLUEFOG_UCX_UNREACHABLE;
    case UCS_ERR_CONNECTION_RESET:
    case UCS_ERR_ENDPOINT_TIMEOUT:
    case UCS_ERR_TIMED_OUT:
    case UCS_ERR_CANCELED:
      return BLUEFOG_UCX_BROKEN;
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
    case UCS_ERR_EXCEEDS_LIMIT:
      return BLUEFOG_UCX_STARVED;
    default:
      return BLUEFOG_UCX_FAILED;
  }
}

void Report(bluefog_ucx_error* error, ucs_status_t status, const std::string& what) {
  error->result = ResultOf(status);
  std::snprintf(error->text, static_cast<size_t>(error->capacity), "%s: %s", what.c_str(),
                ucs_status_string(status));
}

// ---- Callbacks of UCX

ucs_status_t OnMessage(void* arg, const void* header, size_t header_bytes, void* data, size_t bytes,
                       const ucp_am_recv_param_t* param) {
  auto* ucx = static_cast<bluefog_ucx*>(arg);
  const bool lies = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
  ucx->events.message(ucx->events.user, header, static_cast<int64_t>(header_bytes),
                      lies ? nullptr : data, static_cast<int64_t>(bytes), lies ? data : nullptr);
  return lies ? UCS_INPROGRESS : UCS_OK;
}

void OnSent(void* request, ucs_status_t status, void* user_data) {
  auto* peer = static_cast<bluefog_ucx_peer*>(user_data);
  void* const theirs = *static_cast<void**>(request);
  --peer->pending;
  peer->ucx->events.sent(peer->ucx->events.user, theirs, ResultOf(status));
  ucp_request_free(request);
}

void OnReceived(void* request, ucs_status_t status, size_t, void* user_data) {
  auto* ucx = static_cast<bluefog_ucx*>(user_data);
  void* const theirs = *static_cast<void**>(request);
  ucx->events.received(ucx->events.user, theirs, ResultOf(status));
  ucp_request_free(request);
}

void OnError(void* arg, ucp_ep_h, ucs_status_t status) {
  auto* peer = static_cast<bluefog_ucx_peer*>(arg);
  if (peer->down) return;
  peer->down = true;
  peer->ucx->events.peer_down(peer->ucx->events.user, peer->user, ResultOf(status),
                              ucs_status_string(status));
}

// ---- The border

ucs_status_t Open(bluefog_ucx* ucx, const bluefog_ucx_options& options, std::string* what) {
  ucp_config_t* config = nullptr;
  *what = "the configuration of UCX cannot be read";
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return status;
  const char* transports = options.transports;
  if (transports == nullptr && std::getenv("UCX_TLS") == nullptr) transports = "tcp";
  if (transports != nullptr) {
    *what = std::string("UCX does not take the transports '") + transports + "'";
    status = ucp_config_modify(config, "TLS", transports);
  }
  if (status == UCS_OK && options.devices != nullptr) {
    *what = std::string("UCX does not take the network devices '") + options.devices + "'";
    status = ucp_config_modify(config, "NET_DEVICES", options.devices);
  }
  if (status == UCS_OK) {
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_REQUEST_SIZE;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.request_size = sizeof(void*);
    *what = "UCX finds no network to use";
    status = ucp_init(&params, config, &ucx->context);
  }
  ucp_config_release(config);
  if (status != UCS_OK) return status;

  ucp_worker_params_t worker{};
  worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  *what = "UCX makes no worker";
  if (status = ucp_worker_create(ucx->context, &worker, &ucx->worker); status != UCS_OK) {
    return status;
  }
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessageId;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = OnMessage;
  handler.arg = ucx;
  if (status = ucp_worker_set_am_recv_handler(ucx->worker, &handler); status != UCS_OK) {
    return status;
  }
  *what = "UCX cannot be waited for";
  if (status = ucp_worker_get_efd(ucx->worker, &ucx->fd); status != UCS_OK) return status;
  *what = "UCX has no address";
  return ucp_worker_get_address(ucx->worker, &ucx->address, &ucx->address_bytes);
}

void Close(bluefog_ucx* ucx) {
  if (ucx == nullptr) return;
  if (ucx->address != nullptr) ucp_worker_release_address(ucx->worker, ucx->address);
  // What closing left to do.
  for (int i = 0; i < kClosingTurns && ucx->worker != nullptr; ++i) {
    if (ucp_worker_progress(ucx->worker) == 0) break;
  }
  if (ucx->worker != nullptr) ucp_worker_destroy(ucx->worker);
  if (ucx->context != nullptr) ucp_cleanup(ucx->context);
  delete ucx;
}

bluefog_ucx* Make(const bluefog_ucx_options* options, bluefog_ucx_error* error) {
  auto* ucx = new bluefog_ucx;
  ucx->events = options->events;
  std::string what;
  const ucs_status_t status = Open(ucx, *options, &what);
  if (status == UCS_OK) return ucx;
  Report(error, status, what);
  Close(ucx);
  return nullptr;
}

const void* Address(bluefog_ucx* ucx, int64_t* bytes) {
  *bytes = static_cast<int64_t>(ucx->address_bytes);
  return ucx->address;
}

bluefog_ucx_peer* Connect(bluefog_ucx* ucx, const void* address, int64_t, void* peer_user,
                          bluefog_ucx_error* error) {
  ucx->peers.push_back(std::make_unique<bluefog_ucx_peer>());
  bluefog_ucx_peer* const peer = ucx->peers.back().get();
  peer->ucx = ucx;
  peer->user = peer_user;
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = static_cast<const ucp_address_t*>(address);
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {OnError, peer};
  const ucs_status_t status = ucp_ep_create(ucx->worker, &params, &peer->endpoint);
  if (status == UCS_OK) return peer;
  Report(error, status, "no connection");
  ucx->peers.pop_back();
  return nullptr;
}

void Disconnect(bluefog_ucx_peer* peer) {
  peer->down = true;  // It knows.
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  params.flags = UCP_EP_CLOSE_FLAG_FORCE;
  void* const closing = ucp_ep_close_nbx(peer->endpoint, &params);
  // Forced: it needs no answer from the other side, only turns of ours.
  const auto wait = [&](auto&& over) {
    for (int i = 0; i < kClosingTurns && !over(); ++i) ucp_worker_progress(peer->ucx->worker);
  };
  if (UCS_PTR_IS_PTR(closing)) {
    wait([&] { return ucp_request_check_status(closing) != UCS_INPROGRESS; });
    ucp_request_free(closing);
  }
  wait([&] { return peer->pending == 0; });
}

int32_t Send(bluefog_ucx_peer* peer, const void* header, int64_t header_bytes, const void* data,
             int64_t bytes, int32_t lies, void* request) {
  ucp_request_param_t params{};
  params.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK |
                        UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  params.flags = lies != 0 ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
  params.cb.send = OnSent;
  params.user_data = peer;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  void* const sending =
      ucp_am_send_nbx(peer->endpoint, kMessageId, header, static_cast<size_t>(header_bytes), data,
                      static_cast<size_t>(bytes), &params);
  if (!UCS_PTR_IS_PTR(sending)) return ResultOf(UCS_PTR_STATUS(sending));
  *static_cast<void**>(sending) = request;
  ++peer->pending;
  return BLUEFOG_UCX_PENDING;
}

int32_t Receive(bluefog_ucx* ucx, void* arrival, void* destination, int64_t bytes, void* request) {
  ucp_request_param_t params{};
  params.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  params.cb.recv_am = OnReceived;
  params.user_data = ucx;
  params.memory_type = UCS_MEMORY_TYPE_HOST;
  void* const receiving =
      ucp_am_recv_data_nbx(ucx->worker, arrival, destination, static_cast<size_t>(bytes), &params);
  if (!UCS_PTR_IS_PTR(receiving)) return ResultOf(UCS_PTR_STATUS(receiving));
  *static_cast<void**>(receiving) = request;
  return BLUEFOG_UCX_PENDING;
}

void Drop(bluefog_ucx* ucx, void* arrival) { ucp_am_data_release(ucx->worker, arrival); }

int32_t Progress(bluefog_ucx* ucx) {
  return static_cast<int32_t>(ucp_worker_progress(ucx->worker));
}

int32_t Fd(bluefog_ucx* ucx) { return ucx->fd; }

int32_t Arm(bluefog_ucx* ucx) { return ucp_worker_arm(ucx->worker) == UCS_OK ? 1 : 0; }

const char* Describe() {
  static const std::string text = std::string("UCX ") + ucp_get_version_string();
  return text.c_str();
}

}  // namespace

extern "C" const bluefog_ucx_api* bluefog_ucx_factory(void) {
  static const bluefog_ucx_api api = {sizeof(bluefog_ucx_api),
                                      BLUEFOG_UCX_ABI_VERSION,
                                      Make,
                                      Close,
                                      Address,
                                      Connect,
                                      Disconnect,
                                      Send,
                                      Receive,
                                      Drop,
                                      Progress,
                                      Fd,
                                      Arm,
                                      Describe};
  return &api;
}
