// Peers of a UCX transport that are not of the job, or do not keep to the protocol: whatever they
// write, the rank that reads it goes on. They call the component as the transport does.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <random>

#include "base/component.h"
#include "base/token.h"
#include "harness.h"
#include "transport/memfd.h"
#include "transport/ucx/link.h"
#include "transport/ucx/packet.h"
#include "transport/ucx/ucx.h"
#include "transport/ucx/ucx_abi.h"

namespace bluefog::transport::testing {
namespace {

using ::testing::HasSubstr;
using ucx::Frame;
using ucx::LargePacket;
using ucx::PacketHead;

UcxOptions Options(int rank) {
  UcxOptions options;
  options.rank = rank;
  options.size = 3;
  options.job_id = "hostile";
  options.token = std::string(kTokenBytes, 't');
  options.inline_limit = kInlineLimit;
  options.max_in_flight = kMaxInFlight;
  options.component_dir = BLUEFOG_TEST_UCX_DIR;
  return options;
}

/// The address of a UCX transport in its parts.
struct Parts {
  explicit Parts(const std::string& address) {
    const size_t begin = address.find(':', address.find(':') + 1) + 1;
    prefix = address.substr(0, begin);
    nonce = address.substr(begin, kNonceBytes);
    worker = address.substr(begin + kNonceBytes);
  }
  std::string prefix, nonce, worker;
};

/// A worker of its own that plays rank 1 to `victim`, rank 0, packet by packet.
class Played {
 public:
  explicit Played(const std::string& victim) : victim_(victim) {
    // The component is configured by the environment; sizes of segments are equal on all ranks.
    setenv("UCX_TCP_TX_SEG_SIZE", std::to_string(Options(1).segment_bytes).c_str(), 1);
    setenv("UCX_TCP_RX_SEG_SIZE", std::to_string(Options(1).segment_bytes).c_str(), 1);
    const auto symbol = LoadComponentSymbol("ucx", "bluefog_ucx_factory", Options(1).component_dir);
    api_ = reinterpret_cast<decltype(&bluefog_ucx_factory)>(symbol.value())();
    bluefog_ucx_options raw{};
    raw.struct_size = sizeof raw;
    raw.events.user = this;
    raw.events.message = [](void* user, const void* header, int64_t bytes, const void*, int64_t,
                            void* arrival) {
      auto* self = static_cast<Played*>(user);
      PacketHead head{};
      std::memcpy(&head, header, std::min<size_t>(sizeof head, static_cast<size_t>(bytes)));
      self->received.push_back(head);
      if (arrival != nullptr) self->api_->drop(self->ucx_, arrival);
    };
    raw.events.sent = [](void* user, void*, int32_t) { --static_cast<Played*>(user)->pending_; };
    raw.events.received = raw.events.sent;
    raw.events.peer_down = [](void*, void*, int32_t, const char*) {};
    char text[256];
    bluefog_ucx_error error{0, text, sizeof text};
    ucx_ = api_->open(&raw, &error);
    EXPECT_NE(ucx_, nullptr) << text;
    peer_ = api_->connect(ucx_, victim_.worker.data(), static_cast<int64_t>(victim_.worker.size()),
                          nullptr, &error);
    EXPECT_NE(peer_, nullptr) << text;
  }
  ~Played() {
    api_->disconnect(peer_);
    api_->close(ucx_);
  }
  Played(const Played&) = delete;
  Played& operator=(const Played&) = delete;

  std::string address() const {
    int64_t bytes = 0;
    const void* const worker = api_->address(ucx_, &bytes);
    return victim_.prefix + nonce_ +
           std::string(static_cast<const char*>(worker), static_cast<size_t>(bytes));
  }
  PacketHead Head() {
    PacketHead head;
    head.rank = 1;
    head.sequence = ++sequence_;
    head.tag = ucx::MakeTag(Options(1), 1, 0, nonce_ + victim_.nonce);
    return head;
  }
  void Send(const void* header, size_t header_bytes, std::vector<std::byte> data, bool lies) {
    kept_.push_back({static_cast<const std::byte*>(header),
                     static_cast<const std::byte*>(header) + header_bytes});
    const auto& kept_header = kept_.back();
    kept_.push_back(std::move(data));
    const int32_t result =
        api_->send(peer_, kept_header.data(), static_cast<int64_t>(header_bytes),
                   kept_.back().data(), static_cast<int64_t>(kept_.back().size()), lies, this);
    if (result == BLUEFOG_UCX_PENDING) ++pending_;
    Progress();
  }
  void Progress() { api_->progress(ucx_); }
  /// Nothing that was sent so far counts.
  void CountAnew() { sequence_ = 0; }

  std::vector<PacketHead> received;

 private:
  const Parts victim_;
  const std::string nonce_ = std::string(kNonceBytes, 'n');
  const bluefog_ucx_api* api_ = nullptr;
  bluefog_ucx* ucx_ = nullptr;
  bluefog_ucx_peer* peer_ = nullptr;
  std::deque<std::vector<std::byte>> kept_;
  int pending_ = 0;
  uint64_t sequence_ = 0;
};

/// Rank 0, which is played a trick by rank 1, and rank 2, which it serves all the while.
class UcxHostileTest : public ::testing::Test {
 protected:
  UcxHostileTest() {
    for (const int rank : {0, 2}) {
      ranks_.push_back(std::make_unique<Endpoint>(
          rank, Arena::Create(1 << 20),
          [&](Receiver* receiver) { return MakeUcx(Options(rank), receiver); }));
    }
    played_ = std::make_unique<Played>(victim().transport->address());
    for (auto& rank : ranks_) {
      EXPECT_TRUE(rank->transport
                      ->SetPeers({victim().transport->address(), played_->address(),
                                  other().transport->address()})
                      .ok());
    }
  }
  Endpoint& victim() { return *ranks_[0]; }
  Endpoint& other() { return *ranks_[1]; }

  bool DriveUntil(const std::function<bool()>& condition) {
    for (const int64_t end = NowMs() + 10'000; NowMs() < end;) {
      if (condition()) return true;
      bool moved = false;
      for (auto& rank : ranks_) moved |= rank->Progress();
      played_->Progress();
      if (!moved) usleep(200);
    }
    return false;
  }
  /// Rank 0 still serves rank 2.
  void ExpectHealthy() {
    for (Endpoint* from : {&victim(), &other()}) {
      Endpoint& to = from == &victim() ? other() : victim();
      const size_t before = to.inbox.size();
      std::vector<std::byte> payload(100);
      Fill(payload, 5);
      ASSERT_EQ(from->Send(to.rank, 7, payload, ++cookie_), SendResult::kAccepted);
      ASSERT_TRUE(DriveUntil([&] { return to.inbox.size() > before; }));
      EXPECT_EQ(FirstWrong(to.Read(to.inbox.back()), 5), -1);
      to.Release(to.inbox.back());
      ASSERT_TRUE(DriveUntil([&] { return from->done.contains(cookie_); }));
      EXPECT_TRUE(from->breaches.empty()) << from->breaches[0];
    }
    EXPECT_FALSE(victim().down.contains(2));
  }
  int64_t FromPlayed() {
    return std::count_if(victim().inbox.begin(), victim().inbox.end(),
                         [](const Endpoint::Message& m) { return m.peer == 1; });
  }

  std::vector<std::unique_ptr<Endpoint>> ranks_;
  std::unique_ptr<Played> played_;
  uint64_t cookie_ = 0;
};

std::vector<std::byte> Bytes(const std::vector<uint32_t>& slots, const std::vector<Frame>& frames,
                             size_t payload = 0) {
  std::vector<std::byte> bytes;
  for (const uint32_t slot : slots) {
    const auto* at = reinterpret_cast<const std::byte*>(&slot);
    bytes.insert(bytes.end(), at, at + sizeof slot);
  }
  bytes.resize(static_cast<size_t>(ucx::Padded(static_cast<int64_t>(bytes.size()))));
  for (const Frame& frame : frames) {
    const auto* at = reinterpret_cast<const std::byte*>(&frame);
    bytes.insert(bytes.end(), at, at + sizeof frame);
  }
  bytes.resize(bytes.size() + payload);
  return bytes;
}

TEST_F(UcxHostileTest, ThePlayedPeerIsTakenIfItBehaves) {
  PacketHead head = played_->Head();
  head.frames = 1;
  Frame frame;
  frame.bytes = 20;
  played_->Send(&head, sizeof head, Bytes({}, {frame}, 32), false);
  ASSERT_TRUE(DriveUntil([&] { return FromPlayed() == 1; }));
  LargePacket large{played_->Head(), {}};
  large.head.flags = ucx::kLarge;
  large.frame.slot = 1;
  large.frame.bytes = 100'000;
  played_->Send(&large, sizeof large, std::vector<std::byte>(100'000), true);
  ASSERT_TRUE(DriveUntil([&] { return FromPlayed() == 2; }));
  ExpectHealthy();
  EXPECT_TRUE(victim().down.empty());
}

// Whoever is not of the job changes nothing, not even for the rank that it pretends to be.
TEST_F(UcxHostileTest, StrangersAreNotHeard) {
  std::mt19937 random(1);
  for (const size_t header_bytes : {size_t{0}, size_t{1}, sizeof(PacketHead) - 1,
                                    sizeof(PacketHead), sizeof(LargePacket), size_t{4000}}) {
    for (const bool lies : {false, true}) {
      std::vector<std::byte> garbage(header_bytes + 1);
      for (auto& byte : garbage) byte = static_cast<std::byte>(random());
      played_->Send(garbage.data(), header_bytes, std::vector<std::byte>(100'000), lies);
    }
  }
  const std::vector<std::function<void(PacketHead&)>> spoil = {
      [](PacketHead& h) { h.magic ^= 1; },
      [](PacketHead& h) { ++h.abi; },
      [](PacketHead& h) { h.rank = -1; },
      [](PacketHead& h) { h.rank = 0; },
      [](PacketHead& h) { h.rank = 3; },
      [](PacketHead& h) { h.rank = 2; },
      [](PacketHead& h) { h.tag = {}; },
      [](PacketHead& h) { h.flags = ucx::kLarge; },
      [](PacketHead& h) { h.tag.back() ^= std::byte{1}; },
  };
  for (const auto& change : spoil) {
    PacketHead head = played_->Head();
    head.frames = 1;
    change(head);
    played_->Send(&head, sizeof head, Bytes({}, {Frame{}}), false);
  }
  ExpectHealthy();
  EXPECT_EQ(FromPlayed(), 0);
  // A good one after them has arrived, so all of them have; none was counted.
  played_->CountAnew();
  PacketHead good = played_->Head();
  good.frames = 1;
  played_->Send(&good, sizeof good, Bytes({}, {Frame{}}), false);
  ASSERT_TRUE(DriveUntil([&] { return FromPlayed() > 0; }));
  EXPECT_EQ(FromPlayed(), 1);
  EXPECT_TRUE(victim().down.empty());
}

// One token is as good as none: the tag of rank 2 is not that of rank 1, nor is the way back.
TEST_F(UcxHostileTest, TagsAreOfOneTokenOneWayAndOnePair) {
  const std::string nonces(2 * kNonceBytes, 'n');
  const ucx::Tag tag = ucx::MakeTag(Options(1), 1, 0, nonces);
  UcxOptions other = Options(1);
  other.token.back() = 'u';
  EXPECT_NE(ucx::MakeTag(other, 1, 0, nonces), tag);
  EXPECT_NE(ucx::MakeTag(Options(1), 0, 1, nonces), tag);
  EXPECT_NE(ucx::MakeTag(Options(1), 2, 0, nonces), tag);
  EXPECT_NE(ucx::MakeTag(Options(1), 1, 0, std::string(2 * kNonceBytes, 'm')), tag);
}

struct Breach {
  const char* name;
  std::function<void(Played&)> commit;
};
class UcxBreachTest : public UcxHostileTest, public ::testing::WithParamInterface<Breach> {};

TEST_P(UcxBreachTest, EndsThisLinkOnly) {
  GetParam().commit(*played_);
  ASSERT_TRUE(DriveUntil([&] { return victim().down.contains(1); }));
  EXPECT_THAT(std::string(victim().down.at(1).message()), HasSubstr("rank 1: it broke the protoc"));
  ExpectHealthy();
}

void SendJoined(Played& p, const std::function<void(PacketHead&)>& change,
                const std::vector<std::byte>& bytes) {
  PacketHead head = p.Head();
  change(head);
  p.Send(&head, sizeof head, bytes, false);
}

void SendFrames(Played& p, const std::vector<Frame>& frames, size_t payload = 0) {
  SendJoined(
      p, [&](PacketHead& h) { h.frames = static_cast<uint32_t>(frames.size()); },
      Bytes({}, frames, payload));
}

Frame FrameOf(uint32_t slot, int64_t bytes) {
  Frame frame;
  frame.slot = slot;
  frame.bytes = bytes;
  return frame;
}

void SendLarge(Played& p, int64_t told, size_t sent, uint32_t slot = 0) {
  LargePacket large{p.Head(), FrameOf(slot, told)};
  large.head.flags = ucx::kLarge;
  p.Send(&large, sizeof large, std::vector<std::byte>(sent), true);
}

const std::vector<Breach> kBreaches = {
    {"SequenceSkipped", [](Played& p) { SendJoined(p, [](auto& h) { ++h.sequence; }, {}); }},
    {"ReleaseOfNothing",
     [](Played& p) {
       SendJoined(
           p, [](auto& h) { h.releases = 1; }, Bytes({0}, {}));
     }},
    {"RevokesTheUnknown",
     [](Played& p) {
       SendJoined(
           p, [](auto& h) { h.revocations = 1; }, Bytes({9}, {}));
     }},
    {"CountsBeyondThePacket",
     [](Played& p) {
       SendJoined(
           p,
           [](auto& h) {
             h.releases = ~0U;
             h.revocations = ~0U;
           },
           Bytes({0}, {}));
     }},
    {"FramesBeyondThePacket",
     [](Played& p) { SendJoined(p, [](auto& h) { h.frames = ~0U; }, {}); }},
    {"HalfAFrame",
     [](Played& p) {
       SendJoined(
           p, [](auto& h) { h.frames = 1; }, std::vector<std::byte>(50));
     }},
    {"TookMoreThanWasSent", [](Played& p) { SendJoined(p, [](auto& h) { h.taken = 1; }, {}); }},
    {"TookLessThanNothing", [](Played& p) { SendJoined(p, [](auto& h) { h.taken = -1; }, {}); }},
    {"PayloadBeyondThePacket", [](Played& p) { SendFrames(p, {FrameOf(0, 100)}, 50); }},
    {"NegativePayload", [](Played& p) { SendFrames(p, {FrameOf(0, -1)}); }},
    {"LargeAmongTheSmall", [](Played& p) { SendFrames(p, {FrameOf(0, kInlineLimit + 1)}, 2048); }},
    {"SlotOutOfRange", [](Played& p) { SendFrames(p, {FrameOf(kMaxInFlight, 0)}); }},
    {"SlotTwice",
     [](Played& p) {
       SendFrames(p, {FrameOf(3, 0), FrameOf(3, 0)});
     }},
    {"SmallAmongTheLarge", [](Played& p) { SendLarge(p, kInlineLimit, kInlineLimit); }},
    {"LessThanAnnounced", [](Played& p) { SendLarge(p, 1 << 20, 100'000); }},
    {"MoreThanAnnounced", [](Played& p) { SendLarge(p, 100'000, 1 << 20); }},
    {"LargeSlotOutOfRange", [](Played& p) { SendLarge(p, 100'000, 100'000, ~0U); }},
};
INSTANTIATE_TEST_SUITE_P(All, UcxBreachTest, ::testing::ValuesIn(kBreaches),
                         [](const auto& info) { return std::string(info.param.name); });

// What goes to one peer within a turn is joined: else each of many small tensors costs a packet,
// and so does each of their releases.
TEST_F(UcxHostileTest, SmallMessagesOfATurnTravelTogether) {
  Header header{};
  const std::vector<std::byte> payload(64);
  for (uint64_t i = 0; i < 50; ++i) {
    ASSERT_EQ(victim().transport->Send(1, header, payload, 100 + i), SendResult::kAccepted);
    victim().pending.insert(100 + i);
  }
  victim().transport->Flush();
  ASSERT_TRUE(DriveUntil([&] { return !played_->received.empty(); }));
  EXPECT_EQ(played_->received.size(), 1u);
  EXPECT_EQ(played_->received[0].frames, 50u);
}

/// Where this process listens.
std::vector<sockaddr_in> Listeners() {
  std::vector<sockaddr_in> listeners;
  DIR* const folder = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    int listens = 0;
    socklen_t bytes = sizeof listens;
    sockaddr_in address{};
    socklen_t address_bytes = sizeof address;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &bytes) == 0 && listens != 0 &&
        getsockname(fd, reinterpret_cast<sockaddr*>(&address), &address_bytes) == 0 &&
        address.sin_family == AF_INET) {
      listeners.push_back(address);
    }
  }
  closedir(folder);
  return listeners;
}

UniqueFd Connect(const sockaddr_in& address) {
  UniqueFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  return fd;
}

// UCX's own sockets: what is no hello of UCX is hung up on.
TEST_F(UcxHostileTest, GarbageOnTheSocketsOfUcx) {
  const std::vector<sockaddr_in> listeners = Listeners();
  ASSERT_FALSE(listeners.empty());
  std::mt19937 random(1);
  std::vector<UniqueFd> open;
  for (const sockaddr_in& listener : listeners) {
    for (const size_t size :
         {size_t{0}, size_t{1}, size_t{7}, size_t{8}, size_t{100}, size_t{100'000}}) {
      open.push_back(Connect(listener));
      std::vector<unsigned char> bytes(size);
      for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
      (void)send(open.back().get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      ExpectHealthy();
    }
  }
}

}  // namespace
}  // namespace bluefog::transport::testing
