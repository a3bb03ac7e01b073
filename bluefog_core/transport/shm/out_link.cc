#include "transport/shm/out_link.h"

#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "transport/fence.h"

namespace bluefog::transport::shm {

void Doorbell::RingIfArmed(const std::atomic<uint32_t>& armed) {
  const uint32_t epoch = armed.load(std::memory_order_seq_cst);
  if (epoch == 0 || epoch == rung_ || !bell_) return;
  rung_ = epoch;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t ignored = write(bell_.get(), &one, sizeof one);
}

StatusOr<OutLink> OutLink::Create(const Self* self) {
  OutLink link(self);
  const Layout& layout = self->layout;
  auto tx = SealedMemory::Create("bluefog-tx", layout.tx_bytes(), layout.ring_bytes);
  if (!tx.ok()) return tx.status();
  link.tx_ = *std::move(tx);
  link.in_flight_.resize(layout.slots);
  // The slot freed last is used next: its words are in the cache.
  for (uint32_t slot = layout.slots; slot > 0; --slot) link.free_slots_.push_back(slot - 1);
  link.Arm(self->epoch);
  return link;
}

SocketResult OutLink::Connect(const std::string& name) {
  UniqueFd socket;
  if (const auto result = ConnectAbstract(name, &socket); result != SocketResult::kOk) {
    return result;
  }
  Packet hello;
  hello.kind = PacketKind::kHello;
  hello.rank = self_->rank;
  hello.size = self_->size;
  hello.slots = self_->layout.slots;
  hello.ring_bytes = self_->layout.ring_bytes;
  self_->job_id.copy(hello.job, sizeof hello.job - 1);
  const std::array<int, 3> fds = {tx_.fd(), self_->bell.get(), self_->pidfd.get()};
  if (SendPacket(socket.get(), hello, fds) == SocketResult::kAgain) return SocketResult::kAgain;
  // Also when it is closed already: why lies in it to be read.
  socket_ = std::move(socket);
  return SocketResult::kOk;
}

Status OutLink::Welcome(ReceivedPacket* received) {
  if (rx_.data() != nullptr || received->fd_count != 3) {
    return absl::InvalidArgumentError("an answer that nobody asked for");
  }
  if (Status s = CheckBell(received->fds[1].get()); !s.ok()) return s;
  auto rx = SealedMemory::Map(std::move(received->fds[0]), self_->layout.rx_bytes());
  if (!rx.ok()) return rx.status();
  rx_ = *std::move(rx);
  rx_.CloseFd();
  tx_.CloseFd();
  bell_.Set(std::move(received->fds[1]));
  // Frames went into the ring before we could know whether the peer sleeps.
  bell_.RingIfArmed(rx_head()->armed);
  return absl::OkStatus();
}

bool OutLink::UpdateTail() {
  if (rx_head() == nullptr) return true;
  const uint64_t tail = rx_head()->tail.load(std::memory_order_seq_cst);
  if (tail - tail_ > head_ - tail_) return false;
  tail_ = tail;
  return true;
}

bool OutLink::HasRoom(int64_t bytes, Status* problem) {
  const auto fits = [&] {
    return static_cast<int64_t>(head_ - tail_) + bytes <= self_->layout.ring_bytes;
  };
  if (fits()) return true;
  if (!blocked_) {
    // Before the second look, so that the peer either sees the word or we see its tail.
    blocked_ = true;
    tx_head().wants_room.store(1, std::memory_order_seq_cst);
  }
  if (!UpdateTail()) {
    *problem = absl::InvalidArgumentError("freed more of the ring than was used");
    return false;
  }
  if (!fits()) return false;
  blocked_ = false;
  tx_head().wants_room.store(0, std::memory_order_relaxed);
  return true;
}

SendResult OutLink::Send(const Header& header, std::span<const std::byte> payload, uint64_t cookie,
                         Status* problem) {
  if (free_slots_.empty()) return SendResult::kBusy;
  Frame frame{};
  frame.bytes = static_cast<int64_t>(payload.size());
  const bool in_place = frame.bytes > self_->inline_limit;
  frame.kind = in_place ? FrameKind::kInPlace : FrameKind::kInline;
  if (!HasRoom(FrameBytes(frame.kind, frame.bytes), problem)) {
    return problem->ok() ? SendResult::kBusy : SendResult::kDown;
  }
  if (in_place) {
    Arena::Location location;
    if (!self_->arena->Find(payload.data(), frame.bytes, &location)) {
      *problem = absl::InternalError("a payload of " + std::to_string(frame.bytes) +
                                     " bytes is neither small nor in the arena");
      return SendResult::kDown;
    }
    if (!passed_.contains(location.segment)) {
      const SendResult result = PassSegment(location.segment);
      if (result != SendResult::kAccepted) return result;
      ForgetSegments();
      if (!HasRoom(FrameBytes(frame.kind, frame.bytes), problem)) {
        return problem->ok() ? SendResult::kBusy : SendResult::kDown;
      }
    }
    frame.segment = location.segment;
    frame.offset = location.offset;
    payload = {};
  }
  frame.slot = free_slots_.back();
  free_slots_.pop_back();
  in_flight_[frame.slot] = {InFlight::kLive, ++sequence_, cookie};
  frame.sequence = sequence_;
  frame.header = header;
  Publish(frame, payload);
  return SendResult::kAccepted;
}

void OutLink::Publish(const Frame& frame, std::span<const std::byte> payload) {
  const auto ring_bytes = static_cast<uint64_t>(self_->layout.ring_bytes);
  std::byte* at = tx_.data() + self_->layout.ring_offset() + head_ % ring_bytes;
  memcpy(at, &frame, sizeof frame);
  if (!payload.empty()) memcpy(at + sizeof frame, payload.data(), payload.size());
  head_ += static_cast<uint64_t>(FrameBytes(frame.kind, frame.bytes));
  tx_head().head.store(head_, std::memory_order_seq_cst);
  if (rx_head() != nullptr) bell_.RingIfArmed(rx_head()->armed);
}

SendResult OutLink::PassSegment(uint32_t segment) {
  Packet packet;
  packet.kind = PacketKind::kSegment;
  packet.segment = segment;
  const int fd = self_->arena->SegmentFd(segment, &packet.bytes);
  switch (SendPacket(socket_.get(), packet, std::array{fd})) {
    case SocketResult::kOk:
      passed_.insert(segment);
      return SendResult::kAccepted;
    default:
      socket_full_ = true;  // Or closed: why lies in it to be read, which is what comes next.
      return SendResult::kBusy;
  }
}

void OutLink::ForgetSegments() {
  for (auto it = passed_.begin(); it != passed_.end();) {
    int64_t bytes;
    Frame frame{};
    frame.kind = FrameKind::kForget;
    frame.segment = *it;
    Status ignored;
    if (self_->arena->SegmentFd(*it, &bytes) >= 0 ||
        !HasRoom(FrameBytes(frame.kind, 0), &ignored)) {
      ++it;
      continue;
    }
    frame.sequence = ++sequence_;
    Publish(frame, {});
    it = passed_.erase(it);
  }
}

bool OutLink::Revoke(uint64_t cookie) {
  for (uint32_t slot = 0; slot < in_flight_.size(); ++slot) {
    InFlight& entry = in_flight_[slot];
    if (entry.state != InFlight::kLive || entry.cookie != cookie) continue;
    entry.state = InFlight::kRevoked;
    RevokedWords(tx_.data())[slot].store(entry.sequence, std::memory_order_release);
    FenceBeforeOverwrite();
    return true;
  }
  return false;
}

void OutLink::RevokeAll() {
  for (uint32_t slot = 0; slot < in_flight_.size(); ++slot) {
    if (in_flight_[slot].state == InFlight::kFree) continue;
    RevokedWords(tx_.data())[slot].store(in_flight_[slot].sequence, std::memory_order_release);
  }
  FenceBeforeOverwrite();
}

bool OutLink::HasNews() const {
  if (rx_head() == nullptr) return false;
  return rx_head()->releases.load(std::memory_order_seq_cst) != releases_ ||
         (blocked_ && rx_head()->tail.load(std::memory_order_seq_cst) != tail_);
}

StatusOr<bool> OutLink::Poll() {
  if (rx_head() == nullptr) return false;
  bool moved = false;
  const uint64_t releases = rx_head()->releases.load(std::memory_order_acquire);
  const uint64_t slots = self_->layout.slots;
  if (releases - releases_ > slots) return absl::InvalidArgumentError("impossible release count");
  while (releases_ != releases) {
    const uint32_t slot =
        ReleasedWords(rx_.data())[releases_ % slots].load(std::memory_order_relaxed);
    ++releases_;
    if (slot >= slots || in_flight_[slot].state == InFlight::kFree) {
      return absl::InvalidArgumentError("released a message that it did not have");
    }
    const InFlight entry = in_flight_[slot];
    in_flight_[slot].state = InFlight::kFree;
    free_slots_.push_back(slot);
    moved = true;
    if (entry.state == InFlight::kLive) {
      self_->receiver->SendDone(entry.cookie, absl::OkStatus());
    }
  }
  if (blocked_ && rx_head()->tail.load(std::memory_order_relaxed) != tail_) {
    if (!UpdateTail()) return absl::InvalidArgumentError("freed more of the ring than was used");
    blocked_ = false;
    tx_head().wants_room.store(0, std::memory_order_relaxed);
    moved = true;
  }
  return moved;
}

void OutLink::FailAll(const Status& status) {
  for (InFlight& entry : in_flight_) {
    const InFlight was = std::exchange(entry, {});
    if (was.state == InFlight::kLive) self_->receiver->SendDone(was.cookie, status);
  }
}

}  // namespace bluefog::transport::shm
