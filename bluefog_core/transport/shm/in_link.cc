#include "transport/shm/in_link.h"

#include <string.h>

#include <array>
#include <string>
#include <utility>

#include "transport/fence.h"

namespace bluefog::transport::shm {
namespace {

uint64_t Token(uint64_t sequence, uint32_t slot) { return sequence * kMaxSlots + slot; }

}  // namespace

StatusOr<InLink> InLink::Create(const Self* self, ReceivedPacket* hello) {
  const Packet& packet = hello->packet;
  InLink link(self);
  link.peer_ = packet.rank;
  link.layout_ = {packet.slots, packet.ring_bytes};
  auto tx =
      SealedMemory::Map(std::move(hello->fds[0]), link.layout_.tx_bytes(), link.layout_.ring_bytes);
  if (!tx.ok()) return tx.status();
  if (Status s = CheckBell(hello->fds[1].get()); !s.ok()) return s;
  auto rx = SealedMemory::Create("bluefog-rx", link.layout_.rx_bytes());
  if (!rx.ok()) return rx.status();
  link.tx_ = *std::move(tx);
  link.tx_.CloseFd();
  link.rx_ = *std::move(rx);
  link.bell_.Set(std::move(hello->fds[1]));
  link.by_slot_.resize(packet.slots);
  link.spans_.resize(static_cast<size_t>(packet.ring_bytes) / sizeof(Frame) + 1);
  link.Arm(self->epoch);
  return link;
}

bool InLink::SendWelcome(UniqueFd* socket) {
  Packet packet;
  packet.kind = PacketKind::kWelcome;
  packet.rank = self_->rank;
  packet.size = self_->size;
  const std::array<int, 3> fds = {rx_.fd(), self_->bell.get(), self_->pidfd.get()};
  if (SendPacket(socket->get(), packet, fds) != SocketResult::kOk) return false;
  rx_.CloseFd();
  socket_ = std::move(*socket);
  return true;
}

StatusOr<bool> InLink::Poll() {
  const uint64_t head = tx_head().head.load(std::memory_order_acquire);
  if (head == consumed_) return false;
  const auto ring_bytes = static_cast<uint64_t>(layout_.ring_bytes);
  if (head - tail_ > ring_bytes || head - tail_ < consumed_ - tail_) {
    return absl::InvalidArgumentError("published more than the ring holds");
  }
  Status status;
  while (consumed_ != head && status.ok()) {
    const std::byte* at = tx_.data() + layout_.ring_offset() + consumed_ % ring_bytes;
    Frame frame;  // A copy: what has been checked cannot change any more.
    const uint64_t left = head - consumed_;
    if (left < sizeof frame) return absl::InvalidArgumentError("half a frame");
    memcpy(&frame, at, sizeof frame);
    if (frame.bytes < 0 || (frame.kind == FrameKind::kInline && frame.bytes > layout_.ring_bytes) ||
        left < static_cast<uint64_t>(FrameBytes(frame.kind, frame.bytes))) {
      return absl::InvalidArgumentError("a frame with " + std::to_string(frame.bytes) +
                                        " bytes of payload that are not there");
    }
    if (frame.sequence != ++sequence_) {
      return absl::InvalidArgumentError("frame " + std::to_string(frame.sequence) +
                                        " where number " + std::to_string(sequence_) + " was due");
    }
    consumed_ += static_cast<uint64_t>(FrameBytes(frame.kind, frame.bytes));
    // Only inline payloads need their piece of the ring longer than this.
    span(last_span_++) = {consumed_, /*free=*/frame.kind != FrameKind::kInline || frame.bytes == 0};
    if (frame.kind == FrameKind::kForget) {
      Forget(frame.segment);
    } else {
      status = Deliver(frame, at + sizeof frame);
    }
  }
  PublishTail();
  if (!status.ok()) return status;
  return true;
}

Status InLink::Deliver(const Frame& frame, const std::byte* payload) {
  if (frame.slot >= layout_.slots || by_slot_[frame.slot].sequence != 0) {
    return absl::InvalidArgumentError("a message in slot " + std::to_string(frame.slot) +
                                      ", which is in use or does not exist");
  }
  Held held;
  held.sequence = frame.sequence;
  if (frame.kind == FrameKind::kInPlace) {
    auto it = segments_.find(frame.segment);
    if (it == segments_.end()) {
      // The descriptor was sent before the frame, so it lies in the socket.
      Status problem;
      ReadSocket(&problem);
      if (!problem.ok()) return problem;
      it = segments_.find(frame.segment);
    }
    if (it == segments_.end()) {
      return absl::InvalidArgumentError("a payload in segment " + std::to_string(frame.segment) +
                                        ", which it never passed");
    }
    Mapping& mapping = it->second;
    if (frame.offset < 0 || frame.bytes > mapping.memory.bytes() - frame.offset) {
      return absl::InvalidArgumentError("a payload of " + std::to_string(frame.bytes) +
                                        " bytes at " + std::to_string(frame.offset) +
                                        " in a segment of " +
                                        std::to_string(mapping.memory.bytes()));
    }
    ++mapping.views;
    held.segment = frame.segment;
    held.data = mapping.memory.data() + frame.offset;
  } else if (frame.kind != FrameKind::kInline) {
    return absl::InvalidArgumentError("a frame of unknown kind");
  } else if (frame.bytes > 0) {
    held.data = payload;
    held.span = last_span_ - 1;
  }
  by_slot_[frame.slot] = held;
  ++held_;
  View view;
  view.peer = peer_;
  view.token = Token(frame.sequence, frame.slot);
  view.data = frame.bytes > 0 ? held.data : nullptr;
  view.size = frame.bytes;
  self_->receiver->Incoming(peer_, frame.header, view);
  return absl::OkStatus();
}

const InLink::Held* InLink::Find(const View& view) const {
  const auto slot = static_cast<uint32_t>(view.token % kMaxSlots);
  if (slot >= by_slot_.size()) return nullptr;
  const Held& held = by_slot_[slot];
  return held.sequence != 0 && Token(held.sequence, slot) == view.token ? &held : nullptr;
}

const std::byte* InLink::Data(const View& view) const {
  const Held* held = Find(view);
  return held == nullptr ? nullptr : held->data;
}

bool InLink::Intact(const View& view) const {
  FenceAfterRead();
  const Held* held = Find(view);
  if (held == nullptr) return false;
  const auto slot = view.token % kMaxSlots;
  return RevokedWords(tx_.data())[slot].load(std::memory_order_acquire) != held->sequence;
}

void InLink::Detach(const View& view) {
  auto* held = const_cast<Held*>(Find(view));
  if (held == nullptr) return;
  held->data = nullptr;
  if (held->span >= 0) {
    span(std::exchange(held->span, -1)).free = true;
    PublishTail();
  }
  if (held->segment != 0) {
    const uint32_t segment = std::exchange(held->segment, 0);
    const auto it = segments_.find(segment);
    if (--it->second.views == 0 && it->second.forgotten) segments_.erase(it);
  }
}

void InLink::Release(const View& view) {
  auto* held = const_cast<Held*>(Find(view));
  if (held == nullptr) return;
  Detach(view);
  held->sequence = 0;
  --held_;
  const auto slot = static_cast<uint32_t>(view.token % kMaxSlots);
  ReleasedWords(rx_.data())[releases_ % layout_.slots].store(slot, std::memory_order_relaxed);
  rx_head().releases.store(++releases_, std::memory_order_seq_cst);
  bell_.RingIfArmed(tx_head().armed);
}

void InLink::PublishTail() {
  const uint64_t before = tail_;
  while (first_span_ < last_span_ && span(first_span_).free) tail_ = span(first_span_++).end;
  if (tail_ == before) return;
  rx_head().tail.store(tail_, std::memory_order_seq_cst);
  if (tx_head().wants_room.load(std::memory_order_seq_cst) != 0) bell_.RingIfArmed(tx_head().armed);
}

void InLink::Forget(uint32_t segment) {
  const auto it = segments_.find(segment);
  if (it == segments_.end()) return;
  it->second.forgotten = true;
  if (it->second.views == 0) segments_.erase(it);
}

Status InLink::AddSegment(ReceivedPacket* received) {
  const Packet& packet = received->packet;
  if (received->fd_count != 1 || packet.segment == 0 || segments_.contains(packet.segment) ||
      segments_.size() >= kMaxSegments) {
    return absl::InvalidArgumentError("a memory segment that it may not pass");
  }
  auto memory = SealedMemory::Map(std::move(received->fds[0]), packet.bytes);
  if (!memory.ok()) return memory.status();
  memory->CloseFd();
  segments_[packet.segment].memory = *std::move(memory);
  return absl::OkStatus();
}

SocketResult InLink::ReadSocket(Status* problem) {
  if (!socket_) return SocketResult::kClosed;
  while (true) {
    ReceivedPacket received;
    const SocketResult result = ReceivePacket(socket_.get(), &received);
    if (result == SocketResult::kMalformed) {
      *problem = absl::InvalidArgumentError("a malformed packet");
    } else if (result == SocketResult::kStarved) {
      *problem = Starved();
    }
    if (result != SocketResult::kOk) return result;
    if (received.packet.kind == PacketKind::kFarewell) {
      farewell_ = true;
    } else if (received.packet.kind == PacketKind::kRefused) {
      *problem = absl::UnavailableError(received.packet.text);
    } else if (received.packet.kind == PacketKind::kSegment) {
      *problem = AddSegment(&received);
    } else {
      *problem = absl::InvalidArgumentError("a packet of unknown kind");
    }
    if (!problem->ok()) return SocketResult::kMalformed;
  }
}

}  // namespace bluefog::transport::shm
