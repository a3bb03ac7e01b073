#include "harness.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "base/clock.h"
#include "transport/shm/shm.h"
#include "transport/ucx/ucx.h"

namespace bluefog::transport::testing {

std::string NameOf(Kind kind) {
  switch (kind) {
    case Kind::kInproc:
      return "Inproc";
    case Kind::kInprocFetch:
      return "InprocFetch";
    case Kind::kShm:
      return "Shm";
    case Kind::kUcx:
      return "Ucx";
  }
  return "";
}

std::vector<Kind> AllKinds() {
  std::vector<Kind> kinds = {Kind::kInproc, Kind::kInprocFetch, Kind::kShm};
#ifdef BLUEFOG_TEST_UCX_DIR
  kinds.push_back(Kind::kUcx);
#endif
  return kinds;
}

namespace {
#ifndef BLUEFOG_TEST_UCX_DIR
constexpr char kUcxDir[] = "";
#else
constexpr char kUcxDir[] = BLUEFOG_TEST_UCX_DIR;
#endif
}  // namespace

int64_t NowMs() { return NowNs() / 1'000'000; }

Endpoint::Endpoint(int rank, std::shared_ptr<Arena> arena,
                   const std::function<StatusOr<std::unique_ptr<Transport>>(Receiver*)>& make)
    : rank(rank), arena(std::move(arena)) {
  auto made = make(this);
  if (made.ok()) {
    transport = *std::move(made);
  } else {
    breaches.push_back("no transport: " + made.status().ToString());
  }
}

SendResult Endpoint::Send(int peer, uint64_t number, std::span<const std::byte> payload,
                          uint64_t cookie) {
  Header header{};
  std::memcpy(header.bytes.data(), &number, sizeof number);
  // The far end of the header too: a transport that cuts it is found out.
  std::memcpy(header.bytes.data() + kHeaderBytes - sizeof number, &number, sizeof number);
  pending.insert(cookie);
  const SendResult result = transport->Send(peer, header, payload, cookie);
  if (result != SendResult::kAccepted) pending.erase(cookie);
  transport->Flush();
  return result;
}

bool Endpoint::Progress() {
  in_progress_ = true;
  const bool moved = transport->Progress();
  in_progress_ = false;
  return moved;
}

void Endpoint::Detach(const Message& message) { transport->Detach(message.view); }
void Endpoint::Release(const Message& message) {
  transport->Release(message.view);
  transport->Flush();
}

std::vector<std::byte> Endpoint::Read(const Message& message) {
  const View& view = message.view;
  std::vector<std::byte> bytes(static_cast<size_t>(view.size));
  if (view.readable()) {
    if (view.size > 0) std::memcpy(bytes.data(), view.data, bytes.size());
    return bytes;
  }
  const uint64_t cookie = next_fetch_++;
  transport->Fetch(view, bytes.data(), cookie);
  const int64_t deadline = NowMs() + 30'000;
  while (!fetched.contains(cookie) && NowMs() < deadline)
    drive_all ? drive_all() : void(Progress());
  const bool ok = fetched.contains(cookie) && fetched[cookie].ok();
  return ok ? bytes : std::vector<std::byte>();
}

std::span<std::byte> Endpoint::Allocate(int64_t bytes) {
  auto block = arena->Allocate(bytes);
  if (!block.ok()) {
    breaches.push_back(block.status().ToString());
    return {};
  }
  blocks_.push_back(*block);
  return {block->get(), static_cast<size_t>(bytes)};
}

void Endpoint::CheckInside(const char* upcall) {
  if (!in_progress_) breaches.push_back(std::string(upcall) + " from outside Progress");
}

void Endpoint::Incoming(int peer, const Header& header, const View& view) {
  CheckInside("Incoming");
  Message message{peer, 0, view};
  uint64_t last;
  std::memcpy(&message.number, header.bytes.data(), sizeof message.number);
  std::memcpy(&last, header.bytes.data() + kHeaderBytes - sizeof last, sizeof last);
  if (last != message.number) breaches.push_back("the header was changed");
  if (view.peer != peer) breaches.push_back("view of another peer");
  if (on_message) {
    on_message(message);
  } else {
    inbox.push_back(message);
  }
}

void Endpoint::SendDone(uint64_t cookie, const Status& status) {
  CheckInside("SendDone");
  if (pending.erase(cookie) == 0) {
    breaches.push_back("SendDone for cookie " + std::to_string(cookie) +
                       ", which is not in flight");
  }
  done[cookie] = status;
  if (on_done) on_done(cookie, status);
}

void Endpoint::FetchDone(uint64_t cookie, const Status& status) {
  CheckInside("FetchDone");
  if (!fetched.emplace(cookie, status).second) breaches.push_back("FetchDone twice");
}

void Endpoint::PeerDown(int peer, const Status& status) {
  CheckInside("PeerDown");
  if (status.ok()) breaches.push_back("PeerDown without a reason");
  if (!down.emplace(peer, status).second) breaches.push_back("PeerDown twice");
}

namespace {

StatusOr<std::unique_ptr<Transport>> MakeTransport(Kind kind, int rank, int size,
                                                   const std::shared_ptr<Arena>& arena,
                                                   const std::shared_ptr<InprocHub>& hub,
                                                   Receiver* receiver) {
  switch (kind) {
    case Kind::kShm: {
      ShmOptions options;
      options.rank = rank;
      options.size = size;
      options.job_id = "conformance";
      options.inline_limit = kInlineLimit;
      options.ring_bytes = kRingBytes;
      options.max_in_flight = kMaxInFlight;
      return MakeShm(options, arena, receiver);
    }
    case Kind::kUcx: {
      UcxOptions options;
      options.rank = rank;
      options.size = size;
      options.job_id = "conformance";
      options.inline_limit = kInlineLimit;
      options.inline_window = kRingBytes;
      options.max_in_flight = kMaxInFlight;
      options.component_dir = kUcxDir;
      return MakeUcx(options, receiver);
    }
    case Kind::kInproc:
    case Kind::kInprocFetch:
      break;
  }
  InprocOptions options;
  options.fetch_views = kind == Kind::kInprocFetch;
  options.max_in_flight = kMaxInFlight;
  options.inline_limit = kInlineLimit;
  return MakeInproc(hub, rank, receiver, options);
}

}  // namespace

std::unique_ptr<Endpoint> MakeEndpoint(Kind kind, int rank, int size) {
  auto arena = Arena::Create(1 << 20);
  return std::make_unique<Endpoint>(rank, arena, [&](Receiver* receiver) {
    return MakeTransport(kind, rank, size, arena, nullptr, receiver);
  });
}

World::World(Kind kind, int size) : kind_(kind), hub_(std::make_shared<InprocHub>()) {
  std::vector<std::string> addresses;
  for (int rank = 0; rank < size; ++rank) {
    auto arena = Arena::Create(1 << 20);
    ranks_.push_back(std::make_unique<Endpoint>(rank, arena, [&](Receiver* receiver) {
      return MakeTransport(kind, rank, size, arena, hub_, receiver);
    }));
    ranks_.back()->drive_all = [this] { DriveAll(); };
    addresses.push_back(ranks_.back()->transport->address());
  }
  for (auto& rank : ranks_) {
    const Status status = rank->transport->SetPeers(addresses);
    if (!status.ok()) rank->breaches.push_back(status.ToString());
  }
}

bool World::DriveUntil(const std::function<bool()>& condition) {
  const int64_t deadline = NowMs() + 30'000;
  while (!condition()) {
    if (NowMs() > deadline) return false;
    DriveAll();
  }
  return true;
}

void World::DriveAll() {
  for (auto& rank : ranks_) {
    if (rank->transport != nullptr) rank->Progress();
  }
}

void World::Settle() {
  // Longer than the number of turns after which a transport looks at its sockets.
  for (int idle = 0; idle < 200; ++idle) {
    for (auto& rank : ranks_) {
      if (rank->transport != nullptr && rank->Progress()) idle = 0;
    }
    // What is on its way through the kernel moves nobody.
    if (kind_ == Kind::kUcx && idle % 20 == 0) usleep(500);
  }
}

std::string World::Breaches() const {
  std::string text;
  for (const auto& rank : ranks_) {
    for (const std::string& breach : rank->breaches) {
      text += "rank " + std::to_string(rank->rank) + ": " + breach + "\n";
    }
    if (!rank->pending.empty() && rank->transport != nullptr) {
      text += "rank " + std::to_string(rank->rank) + ": " + std::to_string(rank->pending.size()) +
              " sends were accepted and never done\n";
    }
  }
  return text;
}

namespace {
uint8_t PatternByte(uint64_t seed, size_t i) {
  return static_cast<uint8_t>((i + seed) * 0x9e3779b97f4a7c15ULL >> 56);
}
}  // namespace

void Fill(std::span<std::byte> bytes, uint64_t seed) {
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::byte{PatternByte(seed, i)};
}

int64_t FirstWrong(std::span<const std::byte> bytes, uint64_t seed) {
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != std::byte{PatternByte(seed, i)}) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace bluefog::transport::testing
