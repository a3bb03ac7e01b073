// What the shared-memory transport itself costs, in two processes: the round trip of a small
// message, and the rate at which a large payload is read out of the sender's arena, beside the same
// reading without a transport. Not a test: `transport_probe` prints its figures.
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "transport/shm/shm.h"

namespace bluefog::transport {
namespace {

constexpr int64_t kSmall = 4 << 10;
constexpr int64_t kLarge = 64 << 20;
constexpr int64_t kChunk = 512 << 10;
constexpr int kTurns = 20'000;
constexpr int kRounds = 15;

class Rank final : public Receiver {
 public:
  explicit Rank(int rank) : arena(Arena::Create()) {
    ShmOptions options;
    options.rank = rank;
    options.size = 2;
    transport = *MakeShm(options, arena, this);
  }
  void Incoming(int, const Header&, const View& view) override {
    ++received;
    on_message(view);
    transport->Release(view);
  }
  void SendDone(uint64_t, const Status&) override { ++done; }
  void FetchDone(uint64_t, const Status&) override {}
  void PeerDown(int, const Status&) override { _exit(0); }
  void Send(int peer, std::span<const std::byte> payload) {
    while (transport->Send(peer, Header{}, payload, 0) == SendResult::kBusy) transport->Progress();
  }
  void DriveUntil(const std::function<bool()>& condition) {
    while (!condition()) {
      if (!transport->Progress()) sched_yield();
    }
  }

  std::shared_ptr<Arena> arena;
  std::unique_ptr<Transport> transport;
  std::function<void(const View&)> on_message = [](const View&) {};
  int64_t received = 0, done = 0;
};

/// y += w·x, what a receiver does at least.
void Accumulate(float* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += 0.5f * x[i];
}

void Report(const char* what, std::vector<int64_t> ns) {
  std::sort(ns.begin(), ns.end());
  const double median = static_cast<double>(ns[ns.size() / 2]);
  std::printf("%-44s %8.2f ms  %6.2f GB/s (best %.2f)\n", what, median * 1e-6,
              static_cast<double>(kLarge) / median,
              static_cast<double>(kLarge) / static_cast<double>(ns[0]));
}

int Run() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) return 1;
  const pid_t child = fork();
  const int rank = child == 0 ? 1 : 0;
  Rank self(rank);
  const std::string mine = self.transport->address();
  char theirs[256];
  if (write(ends[rank], mine.data(), mine.size()) < 0) return 1;
  const ssize_t got = read(ends[rank], theirs, sizeof theirs);
  std::vector<std::string> book(2, mine);
  book[static_cast<size_t>(1 - rank)].assign(theirs, static_cast<size_t>(got));
  if (!self.transport->SetPeers(book).ok()) return 1;

  const std::vector<std::byte> small(kSmall);
  std::vector<int64_t> turns;
  for (int turn = 0; turn < kTurns; ++turn) {
    const int64_t start = NowNs();
    if (rank == 0) self.Send(1, small);
    self.DriveUntil([&] { return self.received > turn; });
    if (rank == 1) self.Send(0, small);
    turns.push_back(NowNs() - start);
  }
  if (rank == 0) {
    std::sort(turns.begin(), turns.end());
    std::printf("%-44s p50 %.2f  p90 %.2f us (half a round trip, send to read)\n", "4 KiB inline",
                static_cast<double>(turns[kTurns / 2]) / 2000.,
                static_cast<double>(turns[kTurns * 9 / 10]) / 2000.);
  }

  // Rank 0 publishes, rank 1 reads.
  const auto block = *self.arena->Allocate(kLarge);
  const std::span<std::byte> payload(block.get(), static_cast<size_t>(kLarge));
  std::memset(payload.data(), 0, payload.size());
  const std::vector<std::function<void(const View&, int64_t)>> readers = {
      [&](const View& view, int64_t at) {
        std::memcpy(payload.data() + at, view.data, static_cast<size_t>(view.size));
      },
      [&](const View& view, int64_t at) {
        Accumulate(reinterpret_cast<float*>(payload.data() + at),
                   reinterpret_cast<const float*>(view.data), view.size / 4);
      }};
  const char* const names[] = {"64 MiB in 512 KiB frames, memcpy",
                               "64 MiB in 512 KiB frames, y += w x"};
  const char* const bare_names[] = {"  bare: memcpy", "  bare: y += w x"};
  for (size_t reader = 0; reader < readers.size(); ++reader) {
    std::vector<int64_t> rounds, bare;
    const std::byte* first = nullptr;
    for (int round = 0; round < kRounds; ++round) {
      int64_t at = 0;
      self.on_message = [&](const View& view) {
        if (view.size == 0) return;
        if (at == 0) first = view.data;
        readers[reader](view, at);
        at += view.size;
      };
      const int64_t start = NowNs();
      const int64_t want = self.received + 1;
      if (rank == 0) {
        const int64_t done = self.done + kLarge / kChunk;
        for (int64_t i = 0; i < kLarge; i += kChunk) {
          self.Send(1, payload.subspan(static_cast<size_t>(i), kChunk));
        }
        self.DriveUntil([&] { return self.done >= done; });
        rounds.push_back(NowNs() - start);
        self.DriveUntil([&] { return self.received >= want; });
      } else {
        self.DriveUntil([&] { return at == kLarge; });
        // The same bytes, the same reader, nothing in between.
        const int64_t bare_start = NowNs();
        View view;
        view.size = kChunk;
        for (int64_t i = 0; i < kLarge; i += kChunk) {
          view.data = first + i;
          readers[reader](view, i);
        }
        bare.push_back(NowNs() - bare_start);
        self.Send(0, {});
      }
    }
    if (rank == 0) Report(names[reader], rounds);
    if (rank == 1) Report(bare_names[reader], bare);
    std::fflush(stdout);
  }
  if (rank == 0) {
    self.transport.reset();
    waitpid(child, nullptr, 0);
  } else {
    self.DriveUntil([] { return false; });  // PeerDown ends it.
  }
  return 0;
}

}  // namespace
}  // namespace bluefog::transport

int main() { return bluefog::transport::Run(); }
