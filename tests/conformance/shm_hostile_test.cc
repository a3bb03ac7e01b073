// Peers that do not keep to the protocol: whatever they write, the rank that reads it goes on,
// drops them with a reason, and serves everybody else.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>

#include "base/failpoint.h"
#include "harness.h"
#include "transport/shm/layout.h"
#include "transport/shm/shm.h"
#include "transport/shm/socket.h"

namespace bluefog::transport::testing {
namespace {

using shm::Frame;
using shm::FrameKind;
using shm::Packet;
using shm::PacketKind;
using shm::SocketResult;
using ::testing::HasSubstr;

std::string ListenName(const std::string& address) { return address.substr(address.find(':') + 1); }
const shm::Layout kLayout{kMaxInFlight, kRingBytes};

/// Plays rank 1 to a real rank 0 by hand, byte by byte.
class Hostile {
 public:
  explicit Hostile(World& world) : world_(world) {
    EXPECT_EQ(shm::ConnectAbstract(ListenName(world[0].transport->address()), &socket),
              SocketResult::kOk);
    auto memory = SealedMemory::Create("hostile", kLayout.tx_bytes(), kLayout.ring_bytes);
    EXPECT_TRUE(memory.ok());
    tx = *std::move(memory);
    bell = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    pidfd = shm::OpenPidfd(getpid());
    hello.rank = 1;
    hello.size = 2;
    hello.slots = kLayout.slots;
    hello.ring_bytes = kLayout.ring_bytes;
    std::string("conformance").copy(hello.job, sizeof hello.job - 1);
  }
  void SayHello() {
    shm::SendPacket(socket.get(), hello, std::array{tx.fd(), bell.get(), pidfd.get()});
    world_.Settle();
  }
  PacketKind Answer(std::string* text = nullptr) {
    shm::ReceivedPacket received;
    if (shm::ReceivePacket(socket.get(), &received) != SocketResult::kOk) return PacketKind{};
    if (text != nullptr) *text = received.packet.text;
    return received.packet.kind;
  }
  Frame GoodFrame() {
    Frame frame{};
    frame.kind = FrameKind::kInline;
    frame.sequence = ++sequence_;
    return frame;
  }
  void Publish(const Frame& frame, int64_t bytes = sizeof(Frame)) {
    std::memcpy(tx.data() + kLayout.ring_offset() + head % kLayout.ring_bytes, &frame,
                sizeof frame);
    head += static_cast<uint64_t>(bytes);
    reinterpret_cast<shm::TxHead*>(tx.data())->head.store(head);
  }
  void PassSegment(uint32_t number, int fd, int64_t bytes) {
    Packet packet;
    packet.kind = PacketKind::kSegment;
    packet.segment = number;
    packet.bytes = bytes;
    shm::SendPacket(socket.get(), packet, std::array{fd});
  }

  UniqueFd socket, bell, pidfd;
  SealedMemory tx;
  Packet hello;
  uint64_t head = 0;

 private:
  World& world_;
  uint64_t sequence_ = 0;
};

/// Rank 1 can still connect to rank 0 and back.
void ExpectHealthy(World& world) {
  const std::vector<std::byte> payload(100);
  for (const int rank : {0, 1}) {
    ASSERT_EQ(world[rank].Send(1 - rank, 7, payload, 7), SendResult::kAccepted);
  }
  ASSERT_TRUE(world.DriveUntil([&] { return !world[0].inbox.empty() && !world[1].inbox.empty(); }));
  for (const int rank : {0, 1}) world[rank].Release(world[rank].inbox[0]);
  world.Settle();
  EXPECT_EQ(world.Breaches(), "");
}

TEST(ShmHostileTest, GarbageInsteadOfAHello) {
  World world(Kind::kShm, 2);
  std::mt19937 random(1);
  for (size_t size : {size_t{0}, size_t{1}, size_t{8}, sizeof(Packet) - 1, sizeof(Packet),
                      sizeof(Packet) + 1, size_t{60'000}}) {
    UniqueFd socket;
    ASSERT_EQ(shm::ConnectAbstract(ListenName(world[0].transport->address()), &socket),
              SocketResult::kOk);
    std::vector<unsigned char> bytes(size);
    for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
    send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    world.Settle();
  }
  ExpectHealthy(world);
}

TEST(ShmHostileTest, StrangersThatSayNothingMakeRoom) {
  World world(Kind::kShm, 2);
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 300; ++i) {
    UniqueFd socket;
    if (shm::ConnectAbstract(ListenName(world[0].transport->address()), &socket) ==
        SocketResult::kOk) {
      silent.push_back(std::move(socket));
    }
    world.Settle();
  }
  EXPECT_EQ(silent.size(), 300u);
  ExpectHealthy(world);
}

TEST(ShmHostileTest, ThePlayedPeerIsTakenIfItBehaves) {
  World world(Kind::kShm, 2);
  Hostile hostile(world);
  hostile.SayHello();
  EXPECT_EQ(hostile.Answer(), PacketKind::kWelcome);
  hostile.Publish(hostile.GoodFrame());
  world.Settle();
  EXPECT_EQ(world[0].inbox.size(), 1u);
  EXPECT_TRUE(world[0].down.empty());
}

SealedMemory Sealed(int64_t bytes) { return *SealedMemory::Create("x", bytes); }

/// Writes to it would be a signal when nobody reads it any more.
UniqueFd PipeEnd() {
  int ends[2];
  EXPECT_EQ(pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
  close(ends[0]);
  return UniqueFd(ends[1]);
}

struct BadHello {
  const char* name;
  std::function<void(Hostile&)> spoil;
  const char* reason;
};
class BadHelloTest : public ::testing::TestWithParam<BadHello> {};

TEST_P(BadHelloTest, IsRefusedWithoutHarm) {
  World world(Kind::kShm, 2);
  {
    Hostile hostile(world);
    GetParam().spoil(hostile);
    hostile.SayHello();
    std::string text;
    EXPECT_EQ(hostile.Answer(&text), PacketKind::kRefused);
    EXPECT_THAT(text, HasSubstr(GetParam().reason));
  }
  ExpectHealthy(world);
}

/// A descriptor of the right length that could shrink under the reader.
void SayHelloWithOpenMemory(Hostile& h) {
  const UniqueFd open(memfd_create("open", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(open.get(), kLayout.tx_bytes()), 0);
  const std::array fds = {open.get(), h.bell.get(), h.pidfd.get()};
  ASSERT_EQ(shm::SendPacket(h.socket.get(), h.hello, fds), SocketResult::kOk);
}

const std::vector<BadHello> kBadHellos = {
    {"Job", [](Hostile& h) { h.hello.job[0] = 'X'; }, "'Xonformance', not 'conform"},
    {"LongJob", [](Hostile& h) { memset(h.hello.job, 'a', sizeof h.hello.job); }, "job"},
    {"Abi", [](Hostile& h) { ++h.hello.abi; }, "not one of this version"},
    {"Kind", [](Hostile& h) { h.hello.kind = PacketKind::kSegment; }, "hello"},
    {"Rank", [](Hostile& h) { h.hello.rank = -1; }, "rank -1"},
    {"RankTooLarge", [](Hostile& h) { h.hello.rank = 2; }, "rank 2"},
    {"OwnRank", [](Hostile& h) { h.hello.rank = 0; }, "rank 0"},
    {"Size", [](Hostile& h) { h.hello.size = 3; }, "of 3"},
    {"NoSlots", [](Hostile& h) { h.hello.slots = 0; }, "slots"},
    {"Slots", [](Hostile& h) { h.hello.slots = 0xffffffff; }, "slots"},
    {"Ring", [](Hostile& h) { h.hello.ring_bytes = -4096; }, "ring"},
    {"LargeRing", [](Hostile& h) { h.hello.ring_bytes = int64_t{1} << 62; }, "ring"},
    {"OddRing", [](Hostile& h) { h.hello.ring_bytes += 64; }, "ring"},
    {"Short", [](Hostile& h) { h.tx = Sealed(4096); }, "announced"},
    {"NotSealed", SayHelloWithOpenMemory, "not sealed"},
    {"BlockingBell", [](Hostile& h) { h.bell = UniqueFd(eventfd(0, EFD_CLOEXEC)); }, "doorbell"},
    {"PipeForABell", [](Hostile& h) { h.bell = PipeEnd(); }, "doorbell"},
};
INSTANTIATE_TEST_SUITE_P(All, BadHelloTest, ::testing::ValuesIn(kBadHellos),
                         [](const auto& info) { return info.param.name; });

struct BadFrame {
  const char* name;
  std::function<void(Hostile&)> act;
};
class BadFrameTest : public ::testing::TestWithParam<BadFrame> {};

TEST_P(BadFrameTest, EndsTheLinkAndNothingElse) {
  World world(Kind::kShm, 2);
  Hostile hostile(world);
  hostile.SayHello();
  ASSERT_EQ(hostile.Answer(), PacketKind::kWelcome);
  hostile.Publish(hostile.GoodFrame());
  world.Settle();
  ASSERT_EQ(world[0].inbox.size(), 1u);
  GetParam().act(hostile);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].down.contains(1); }));
  EXPECT_TRUE(absl::IsInvalidArgument(world[0].down[1])) << world[0].down[1];
  EXPECT_THAT(std::string(world[0].down[1].message()), HasSubstr("rank 1"));
  EXPECT_EQ(world[0].inbox.size(), 1u);
  world[0].Release(world[0].inbox[0]);
  world.Settle();
  EXPECT_EQ(world[0].Send(1, 0, {}, 1), SendResult::kDown);
  EXPECT_THAT(world[0].breaches, ::testing::IsEmpty());
}

Frame InPlace(Hostile& h, uint32_t segment, int64_t offset, int64_t bytes) {
  Frame frame = h.GoodFrame();
  frame.kind = FrameKind::kInPlace;
  frame.slot = 1;
  frame.segment = segment;
  frame.offset = offset;
  frame.bytes = bytes;
  return frame;
}

void WithSegment(Hostile& h, int64_t offset, int64_t bytes) {
  const SealedMemory memory = Sealed(8192);
  h.PassSegment(5, memory.fd(), 8192);
  h.Publish(InPlace(h, 5, offset, bytes));
}

void Spoiled(Hostile& h, const std::function<void(Frame&)>& spoil) {
  Frame frame = h.GoodFrame();
  frame.slot = 1;
  spoil(frame);
  h.Publish(frame);
}

constexpr int64_t kHuge = INT64_MAX;

void PassOpenSegment(Hostile& h) {
  const UniqueFd open(memfd_create("open", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(open.get(), 8192), 0);
  h.PassSegment(5, open.get(), 8192);
  h.Publish(InPlace(h, 5, 0, 10));
}
void PassShortSegment(Hostile& h) {
  const SealedMemory memory = Sealed(4096);
  h.PassSegment(5, memory.fd(), 8192);
}
void PassSegmentTwice(Hostile& h) {
  const SealedMemory memory = Sealed(4096);
  h.PassSegment(5, memory.fd(), 4096);
  h.PassSegment(5, memory.fd(), 4096);
}
void PassNoDescriptor(Hostile& h) {
  Packet packet;
  packet.kind = PacketKind::kSegment;
  packet.segment = 5;
  shm::SendPacket(h.socket.get(), packet);
}
void SayHelloTwice(Hostile& h) {
  const std::array fds = {h.tx.fd(), h.bell.get(), h.pidfd.get()};
  shm::SendPacket(h.socket.get(), h.hello, fds);
}

const std::vector<BadFrame> kBadFrames = {
    {"Kind", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.kind = FrameKind{7}; }); }},
    {"Sequence", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.sequence = 9; }); }},
    {"Slot", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.slot = 1 << 20; }); }},
    {"SlotInUse", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.slot = 0; }); }},
    {"Negative", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.bytes = -1; }); }},
    {"Huge", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.bytes = kHuge; }); }},
    {"NotThere", [](Hostile& h) { Spoiled(h, [](Frame& f) { f.bytes = 64; }); }},
    {"HalfAFrame", [](Hostile& h) { h.Publish(h.GoodFrame(), 64); }},
    {"MoreThanTheRing", [](Hostile& h) { h.Publish(h.GoodFrame(), kRingBytes + 128); }},
    {"Backwards", [](Hostile& h) { h.Publish(h.GoodFrame(), -64); }},
    {"Segment", [](Hostile& h) { h.Publish(InPlace(h, 3, 0, 10)); }},
    {"SegmentZero", [](Hostile& h) { h.Publish(InPlace(h, 0, 0, 10)); }},
    {"OffsetBehind", [](Hostile& h) { WithSegment(h, 8193, 1); }},
    {"OffsetNegative", [](Hostile& h) { WithSegment(h, -1, 1); }},
    {"OffsetHuge", [](Hostile& h) { WithSegment(h, kHuge, 1); }},
    {"SizeBehind", [](Hostile& h) { WithSegment(h, 8000, 193); }},
    {"SizeHuge", [](Hostile& h) { WithSegment(h, 1, kHuge); }},
    {"SegmentNotSealed", PassOpenSegment},
    {"SegmentShorterThanItSays", PassShortSegment},
    {"SegmentTwice", PassSegmentTwice},
    {"SegmentWithoutDescriptor", PassNoDescriptor},
    {"SecondHello", SayHelloTwice},
    {"GarbagePacket", [](Hostile& h) { send(h.socket.get(), "garbage", 7, MSG_NOSIGNAL); }},
};
INSTANTIATE_TEST_SUITE_P(All, BadFrameTest, ::testing::ValuesIn(kBadFrames),
                         [](const auto& info) { return info.param.name; });

/// Plays the receiver to a real sender.
class HostileReceiverTest : public ::testing::Test {
 protected:
  HostileReceiverTest()
      : endpoint_(0, Arena::Create(), [](Receiver* receiver) {
          ShmOptions options;
          options.size = 2;
          options.max_in_flight = kMaxInFlight;
          options.ring_bytes = kRingBytes;
          options.inline_limit = kInlineLimit;
          return MakeShm(options, Arena::Create(), receiver);
        }) {
    const std::string name = "bluefog-test-" + shm::RandomHex(8);
    listener_ = *shm::ListenAbstract(name, 4);
    EXPECT_TRUE(endpoint_.transport->SetPeers({"", "shm1:" + name}).ok());
    EXPECT_EQ(endpoint_.Send(1, 0, {}, 0), SendResult::kAccepted);
    EXPECT_EQ(shm::Accept(listener_.get(), &socket_), SocketResult::kOk);
    rx_ = Sealed(kLayout.rx_bytes());
    bell_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  }
  void Welcome(int rx_fd) {
    Packet packet;
    packet.kind = PacketKind::kWelcome;
    const UniqueFd pidfd = shm::OpenPidfd(getpid());
    shm::SendPacket(socket_.get(), packet, std::array{rx_fd, bell_.get(), pidfd.get()});
  }
  shm::RxHead& head() { return *reinterpret_cast<shm::RxHead*>(rx_.data()); }
  void Settle() {
    for (int i = 0; i < 200; ++i) endpoint_.Progress();
  }
  void ExpectDown(absl::StatusCode code) {
    Settle();
    ASSERT_TRUE(endpoint_.down.contains(1));
    EXPECT_EQ(endpoint_.down[1].code(), code) << endpoint_.down[1];
    EXPECT_TRUE(endpoint_.pending.empty());
    EXPECT_THAT(endpoint_.breaches, ::testing::IsEmpty());
  }

  Endpoint endpoint_;
  UniqueFd listener_, socket_, bell_;
  SealedMemory rx_;
};

TEST_F(HostileReceiverTest, IsTakenIfItBehaves) {
  Welcome(rx_.fd());
  shm::ReleasedWords(rx_.data())[0].store(0);
  head().releases.store(1);
  Settle();
  EXPECT_TRUE(endpoint_.done.contains(0) && endpoint_.done[0].ok());
  EXPECT_TRUE(endpoint_.down.empty());
}
TEST_F(HostileReceiverTest, ReleasesMoreThanThereAre) {
  Welcome(rx_.fd());
  head().releases.store(2);
  Settle();
  ASSERT_TRUE(endpoint_.down.contains(1));
  EXPECT_TRUE(absl::IsInvalidArgument(endpoint_.down[1]));
}
TEST_F(HostileReceiverTest, ReleaseCountIsImpossible) {
  Welcome(rx_.fd());
  head().releases.store(~uint64_t{0});
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, ReleasesASlotThatDoesNotExist) {
  Welcome(rx_.fd());
  shm::ReleasedWords(rx_.data())[0].store(0xffffffff);
  head().releases.store(1);
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, FreesMoreOfTheRingThanWasUsed) {
  Welcome(rx_.fd());
  head().tail.store(uint64_t{1} << 40);
  Settle();
  const std::vector<std::byte> payload(static_cast<size_t>(kInlineLimit));
  uint64_t cookie = 1;
  while (endpoint_.Send(1, 0, payload, cookie) == SendResult::kAccepted) {
    ASSERT_LE(++cookie, uint64_t{kMaxInFlight});
  }
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, AnswersWithMemoryOfTheWrongLength) {
  const SealedMemory memory = Sealed(kLayout.rx_bytes() + 4096);
  Welcome(memory.fd());
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, AnswersWithADoorbellThatBlocks) {
  bell_ = UniqueFd(eventfd(0, EFD_CLOEXEC));
  Welcome(rx_.fd());
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, AnswersTwice) {
  Welcome(rx_.fd());
  Welcome(rx_.fd());
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, AnswersGarbage) {
  send(socket_.get(), "garbage", 7, MSG_NOSIGNAL);
  ExpectDown(absl::StatusCode::kInvalidArgument);
}
TEST_F(HostileReceiverTest, HangsUp) {
  socket_.Reset();
  ExpectDown(absl::StatusCode::kUnavailable);
}

TEST(ShmRefusalTest, AnotherJobIsRefusedAndBothAreNamed) {
  World world(Kind::kShm, 2);
  auto arena = Arena::Create();
  Endpoint other(1, arena, [&](Receiver* receiver) {
    ShmOptions options;
    options.rank = 1;
    options.size = 2;
    options.job_id = "another";
    return MakeShm(options, arena, receiver);
  });
  ASSERT_TRUE(other.transport->SetPeers({world[0].transport->address(), ""}).ok());
  ASSERT_EQ(other.Send(0, 0, {}, 0), SendResult::kAccepted);
  world.Settle();
  for (int i = 0; i < 200; ++i) other.Progress();
  ASSERT_TRUE(other.down.contains(0));
  EXPECT_THAT(std::string(other.down[0].message()), HasSubstr("'another', not 'conformance'"));
  EXPECT_TRUE(absl::IsUnavailable(other.done[0]));
  ExpectHealthy(world);
}

TEST(ShmFailpointTest, AConnectionThatFailsIsAnErrorOnTheSender) {
  for (const char* failpoint : {"shm.connect", "shm.accept"}) {
    World world(Kind::kShm, 2);
    ASSERT_TRUE(SetFailpoints(std::string(failpoint) + "=error").ok());
    const SendResult result = world[0].Send(1, 0, {}, 0);
    world.Settle();
    ASSERT_TRUE(SetFailpoints("").ok());
    ASSERT_TRUE(world[0].down.contains(1)) << failpoint;
    EXPECT_THAT(std::string(world[0].down[1].message()), HasSubstr(failpoint));
    EXPECT_EQ(world[0].done.size(), result == SendResult::kAccepted ? 1u : 0u);
    EXPECT_EQ(world.Breaches(), "");
  }
}

TEST(ShmRefusalTest, OptionsThatCannotWorkAreNamed) {
  Endpoint nobody(0, Arena::Create(), [](Receiver*) {
    return StatusOr<std::unique_ptr<Transport>>(absl::UnknownError(""));
  });
  const auto make = [&](auto change) {
    ShmOptions options;
    options.size = 2;
    change(options);
    return MakeShm(options, Arena::Create(), &nobody).status();
  };
  EXPECT_TRUE(make([](ShmOptions&) {}).ok());
  for (const Status& status :
       {make([](ShmOptions& o) { o.rank = 2; }), make([](ShmOptions& o) { o.size = 0; }),
        make([](ShmOptions& o) { o.inline_limit = -1; }),
        make([](ShmOptions& o) { o.inline_limit = o.ring_bytes; }),
        make([](ShmOptions& o) { o.ring_bytes = int64_t{1} << 40; }),
        make([](ShmOptions& o) { o.max_in_flight = 0; }),
        make([](ShmOptions& o) { o.max_in_flight = 1 << 20; }),
        make([](ShmOptions& o) { o.job_id = std::string(128, 'x'); })}) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
  World world(Kind::kShm, 2);
  EXPECT_TRUE(absl::IsInvalidArgument(world[0].transport->SetPeers({"a"})));
  EXPECT_TRUE(absl::IsInvalidArgument(world[0].transport->SetPeers({"", "ucx:1"})));
}

}  // namespace
}  // namespace bluefog::transport::testing
