#include "transport/ucx/link.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/token.h"

namespace bluefog::transport::ucx {
namespace {

// A joined packet is sent when it holds so much, at the end of a turn at the latest.
constexpr size_t kJoinedBytes = 32 << 10;
// Joined packets to one peer that the network has not taken.
constexpr size_t kMaxJoined = 16;
// How much longer than alone on its way a fetch may take, at least: more, and others are queued
// before it.
constexpr int64_t kQueueNs = 2'500'000;

template <typename T>
void Append(std::vector<std::byte>* bytes, const T* data, size_t count) {
  const auto* from = reinterpret_cast<const std::byte*>(data);
  bytes->insert(bytes->end(), from, from + count * sizeof(T));
}

void Pad(std::vector<std::byte>* bytes) {
  bytes->resize(static_cast<size_t>(Padded(static_cast<int64_t>(bytes->size()))));
}

Status Breach(const std::string& what) { return absl::InvalidArgumentError(what); }

}  // namespace

uint32_t Self::TakeBuffer(std::span<const std::byte> bytes) {
  if (free_buffers.empty()) {
    free_buffers.push_back(static_cast<uint32_t>(buffers.size()));
    buffers.emplace_back();
  }
  const uint32_t index = free_buffers.back();
  free_buffers.pop_back();
  buffers[index].bytes.assign(bytes.begin(), bytes.end());
  buffers[index].users = 1;
  return index;
}

void Self::Unuse(uint32_t buffer) {
  if (--buffers[buffer].users == 0) free_buffers.push_back(buffer);
}

Tag MakeTag(const UcxOptions& options, int from, int to, const std::string& nonces) {
  const std::string proof =
      Prove(options.token, "ucx",
            options.job_id + ":" + std::to_string(from) + ":" + std::to_string(to), nonces);
  Tag tag;
  std::memcpy(tag.data(), proof.data(), tag.size());
  return tag;
}

// In a time that does not tell how much of it is right.
bool Link::Recognizes(const Tag& tag) const {
  std::byte differ{0};
  for (size_t i = 0; i < tag.size(); ++i) differ |= tag[i] ^ in_tag_[i];
  return differ == std::byte{0};
}

Status Link::Problem(int32_t result) const {
  switch (result) {
    case BLUEFOG_UCX_UNREACHABLE:
      return absl::NotFoundError("nobody answers there");
    case BLUEFOG_UCX_STARVED:
      return absl::ResourceExhaustedError("no memory or descriptors for the network");
    default:
      return absl::UnavailableError("the connection broke");
  }
}

Status Link::Connect() {
  char text[256] = "";
  bluefog_ucx_error error{0, text, sizeof text};
  peer_ = self_->api->connect(self_->ucx, address_.data(), static_cast<int64_t>(address_.size()),
                              this, &error);
  if (peer_ != nullptr) return absl::OkStatus();
  return Status(Problem(error.result).code(), text);
}

void Link::Disconnect() {
  if (peer_ == nullptr) return;
  for (Held& held : held_) {
    if (held.arrival != nullptr) self_->api->drop(self_->ucx, std::exchange(held.arrival, nullptr));
  }
  self_->api->disconnect(std::exchange(peer_, nullptr));
}

// ---- Out

uint32_t Link::NewFlight(const Header& header, int64_t bytes, uint64_t cookie) {
  if (free_flights_.empty()) {
    free_flights_.push_back(static_cast<uint32_t>(flights_.size()));
    flights_.emplace_back();
  }
  const uint32_t slot = free_flights_.back();
  free_flights_.pop_back();
  Flight& f = flights_[slot];
  f.request = {Request::Kind::kLarge, this, slot};
  f.packet.frame.slot = slot;
  f.packet.frame.bytes = bytes;
  f.packet.frame.header = header;
  f.cookie = cookie;
  f.inline_bytes = 0;
  f.used = true;
  f.revoked = f.on_wire = f.released = false;
  ++in_flight_;
  return slot;
}

SendResult Link::Send(const Header& header, std::span<const std::byte> payload, uint64_t cookie,
                      Status* problem) {
  const auto bytes = static_cast<int64_t>(payload.size());
  if (in_flight_ >= self_->options.max_in_flight) return SendResult::kBusy;
  if (bytes > self_->options.inline_limit) return SendLarge(header, payload, cookie, problem);
  if (inline_out_ - told_inline_ + bytes > self_->options.inline_window) return SendResult::kBusy;
  if (frames_.size() >= kJoinedBytes) {
    const StatusOr<bool> flushed = Flush();
    if (!flushed.ok()) {
      *problem = flushed.status();
      return SendResult::kDown;
    }
    if (!*flushed) return SendResult::kBusy;
  }
  Flight& f = flights_[NewFlight(header, bytes, cookie)];
  f.inline_bytes = bytes;
  inline_out_ += bytes;
  Append(&frames_, &f.packet.frame, 1);
  Append(&frames_, payload.data(), payload.size());
  Pad(&frames_);
  ++frame_count_;
  return SendResult::kAccepted;
}

SendResult Link::SendLarge(const Header& header, std::span<const std::byte> payload,
                           uint64_t cookie, Status* problem) {
  // What was sent before it arrives before it.
  const StatusOr<bool> flushed = Flush();
  if (!flushed.ok()) {
    *problem = flushed.status();
    return SendResult::kDown;
  }
  if (!*flushed) return SendResult::kBusy;
  const uint32_t slot = NewFlight(header, static_cast<int64_t>(payload.size()), cookie);
  Flight& f = flights_[slot];
  f.packet.head = NextHead(kLarge);
  const int32_t result =
      self_->api->send(peer_, &f.packet, sizeof f.packet, payload.data(),
                       static_cast<int64_t>(payload.size()), /*lies=*/1, &f.request);
  if (result == BLUEFOG_UCX_DONE || result == BLUEFOG_UCX_PENDING) {
    f.on_wire = result == BLUEFOG_UCX_PENDING;
    return SendResult::kAccepted;
  }
  EndFlight(&f);
  *problem = Problem(result);
  return SendResult::kDown;
}

PacketHead Link::NextHead(uint16_t flags) {
  PacketHead head;
  head.flags = flags;
  head.rank = self_->options.rank;
  head.tag = out_tag_;
  head.sequence = ++sent_packets_;
  head.taken = told_taken_ = taken_;
  return head;
}

StatusOr<bool> Link::Flush(uint16_t flags) {
  // Few bytes that were taken wait until there is more to say.
  const bool room = taken_ - told_taken_ >= self_->options.inline_window / 4;
  if (frame_count_ == 0 && releases_.empty() && revocations_.empty() && !room && flags == 0) {
    return true;
  }
  if (peer_ == nullptr) return true;
  if (free_joined_.empty()) {
    if (joined_.size() >= kMaxJoined) return false;
    free_joined_.push_back(static_cast<uint32_t>(joined_.size()));
    joined_.push_back({{Request::Kind::kJoined, this, free_joined_.back()}, {}, {}});
  }
  Joined& joined = joined_[free_joined_.back()];
  joined.head = NextHead(flags);
  joined.head.releases = static_cast<uint32_t>(releases_.size());
  joined.head.revocations = static_cast<uint32_t>(revocations_.size());
  joined.head.frames = frame_count_;
  joined.bytes.clear();
  Append(&joined.bytes, releases_.data(), releases_.size());
  Append(&joined.bytes, revocations_.data(), revocations_.size());
  Pad(&joined.bytes);
  Append(&joined.bytes, frames_.data(), frames_.size());
  releases_.clear();
  revocations_.clear();
  frames_.clear();
  frame_count_ = 0;
  const int32_t result =
      self_->api->send(peer_, &joined.head, sizeof joined.head, joined.bytes.data(),
                       static_cast<int64_t>(joined.bytes.size()), /*lies=*/0, &joined.request);
  if (result == BLUEFOG_UCX_PENDING) free_joined_.pop_back();
  if (result != BLUEFOG_UCX_DONE && result != BLUEFOG_UCX_PENDING) return Problem(result);
  return true;
}

void Link::Sent(const Request& request) {
  if (request.kind == Request::Kind::kJoined) {
    free_joined_.push_back(request.index);
    return;
  }
  Flight& f = flights_[request.index];
  if (!f.used) return;  // Failed before.
  f.on_wire = false;
  if (f.revoked) self_->cancelled.push_back(f.cookie);
  if (f.released) OnReleased(&f);
}

void Link::Revoke(uint64_t cookie) {
  for (Flight& f : flights_) {
    if (!f.used || f.cookie != cookie || f.revoked) continue;
    f.revoked = true;
    revocations_.push_back(f.packet.frame.slot);
    // Else the caller could write into what the network is reading. The peer lets go of it when it
    // hears of this.
    if (!f.on_wire) self_->cancelled.push_back(cookie);
    return;
  }
}

void Link::EndFlight(Flight* flight) {
  flight->used = false;
  free_flights_.push_back(flight->packet.frame.slot);
  --in_flight_;
}

void Link::OnReleased(Flight* flight) {
  if (flight->on_wire) {
    flight->released = true;
    return;
  }
  const bool revoked = flight->revoked;
  const uint64_t cookie = flight->cookie;
  EndFlight(flight);
  if (!revoked) self_->receiver->SendDone(cookie, absl::OkStatus());
}

void Link::FailAll(const Status& status) {
  for (uint32_t slot = 0; slot < flights_.size(); ++slot) {
    Flight& f = flights_[slot];
    if (!f.used) continue;
    const bool told = f.revoked && !f.on_wire;
    const uint64_t cookie = f.cookie;
    const Status end = f.revoked ? absl::CancelledError("the send was given up") : status;
    f.on_wire = false;
    EndFlight(&f);
    if (!told) self_->receiver->SendDone(cookie, end);
  }
  frames_.clear();
  frame_count_ = 0;
}

// ---- In

Link::Held* Link::Find(const View& view) {
  const auto slot = static_cast<uint32_t>(view.token);
  if (slot >= held_.size()) return nullptr;
  Held& held = held_[slot];
  return held.used && held.generation == view.token >> 32 ? &held : nullptr;
}
const Link::Held* Link::Find(const View& view) const { return const_cast<Link*>(this)->Find(view); }

Status Link::Hold(const Frame& frame, bool large, Held** result) {
  if (frame.slot >= static_cast<uint32_t>(self_->options.max_in_flight) || frame.bytes < 0 ||
      large != (frame.bytes > self_->options.inline_limit)) {
    return Breach("a message of " + std::to_string(frame.bytes) + " bytes in slot " +
                  std::to_string(frame.slot));
  }
  while (held_.size() <= frame.slot) held_.emplace_back();
  Held& held = held_[frame.slot];
  if (held.used) return Breach("slot " + std::to_string(frame.slot) + " is in use");
  held.used = true;
  held.large = large;
  held.detached = held.revoked = false;
  held.arrival = nullptr;
  held.destination = nullptr;
  ++held.generation;
  held.request = {Request::Kind::kFetch, this, frame.slot};
  held.view = {rank_, uint64_t{held.generation} << 32 | frame.slot, nullptr, frame.bytes};
  *result = &held;
  return absl::OkStatus();
}

Status Link::OnJoined(const PacketHead& head, uint32_t buffer) {
  const std::vector<std::byte>& bytes = self_->buffers[buffer].bytes;
  if (head.sequence != ++seen_packets_) return Breach("a packet is missing");
  const uint64_t slots = uint64_t{head.releases} + head.revocations;
  const auto at = static_cast<size_t>(Padded(static_cast<int64_t>(slots * sizeof(uint32_t))));
  if (at > bytes.size() || head.taken > inline_out_ || head.taken < told_inline_) {
    return Breach("a packet of " + std::to_string(bytes.size()) + " bytes");
  }
  told_inline_ = head.taken;
  const auto slot_at = [&](uint64_t i) {
    uint32_t slot;
    std::memcpy(&slot, bytes.data() + i * sizeof slot, sizeof slot);
    return slot;
  };
  for (uint32_t i = 0; i < head.releases; ++i) {
    const uint32_t slot = slot_at(i);
    if (slot >= flights_.size() || !flights_[slot].used || flights_[slot].released) {
      return Breach("a release of slot " + std::to_string(slot) + ", which is not in flight");
    }
    OnReleased(&flights_[slot]);
  }
  if (Status s = Frames(head, buffer, at); !s.ok()) return s;
  for (uint64_t i = head.releases; i < slots; ++i) {
    const uint32_t slot = slot_at(i);
    if (slot >= held_.size()) return Breach("an unknown message is revoked");
    Held& held = held_[slot];
    if (!held.used) continue;  // The release crossed with it.
    held.revoked = true;
    if (held.arrival != nullptr && held.destination == nullptr) {
      self_->api->drop(self_->ucx, std::exchange(held.arrival, nullptr));
    }
  }
  return absl::OkStatus();
}

Status Link::Frames(const PacketHead& head, uint32_t buffer, size_t at) {
  const std::vector<std::byte>& bytes = self_->buffers[buffer].bytes;
  for (uint32_t i = 0; i < head.frames; ++i) {
    Frame frame;
    if (bytes.size() - at < sizeof frame) return Breach("a packet ends in a frame");
    std::memcpy(&frame, bytes.data() + at, sizeof frame);
    at += sizeof frame;
    Held* held = nullptr;
    if (Status s = Hold(frame, false, &held); !s.ok()) return s;
    const auto size = static_cast<size_t>(Padded(frame.bytes));
    if (bytes.size() - at < size) return Breach("a packet ends in a payload");
    held->buffer = buffer;
    if (frame.bytes > 0) held->view.data = bytes.data() + at;
    at += size;
    ++self_->buffers[buffer].users;
    self_->receiver->Incoming(rank_, frame.header, held->view);
  }
  return absl::OkStatus();
}

Status Link::OnLarge(const LargePacket& packet, int64_t bytes, void* arrival) {
  Held* held = nullptr;
  Status status = absl::OkStatus();
  if (packet.head.sequence != ++seen_packets_ || bytes != packet.frame.bytes) {
    status = Breach("a message of " + std::to_string(bytes) + " bytes is announced with " +
                    std::to_string(packet.frame.bytes));
  }
  if (status.ok()) status = Hold(packet.frame, true, &held);
  if (!status.ok()) {
    self_->api->drop(self_->ucx, arrival);
    return status;
  }
  held->arrival = arrival;
  self_->receiver->Incoming(rank_, packet.frame.header, held->view);
  return absl::OkStatus();
}

void Link::Fetch(const View& view, std::byte* destination, uint64_t cookie) {
  Held* held = Find(view);
  const auto done = [&](Status status) { self_->fetched.push_back({cookie, std::move(status)}); };
  if (held == nullptr || (held->detached && view.size > 0)) {
    return done(absl::FailedPreconditionError("fetch of a view that is released or detached"));
  }
  if (held->revoked) return done(absl::CancelledError("the sender gave up the message"));
  if (!held->large) {
    if (view.size > 0) std::memcpy(destination, held->view.data, static_cast<size_t>(view.size));
    return done(absl::OkStatus());
  }
  if (held->arrival == nullptr) {
    return done(absl::FailedPreconditionError("a large view can be fetched once"));
  }
  if (peer_ == nullptr) {
    return done(absl::UnavailableError("rank " + std::to_string(rank_) + " is gone"));
  }
  held->destination = destination;
  held->cookie = cookie;
  fetch_waiting_.push_back(held->request.index);
  StartFetches();
}

void Link::StartFetches() {
  while (!fetch_waiting_.empty()) {
    Held& held = held_[fetch_waiting_.front()];
    if (fetching_bytes_ > 0 && fetching_bytes_ + held.view.size > fetch_window_) return;
    fetch_waiting_.pop_front();
    fetching_bytes_ += held.view.size;
    held.begin_ns = NowNs();
    // Gone or revoked meanwhile: it ends like one that failed.
    const int32_t result =
        peer_ == nullptr || held.revoked
            ? BLUEFOG_UCX_BROKEN
            : self_->api->receive(self_->ucx, std::exchange(held.arrival, nullptr),
                                  held.destination, held.view.size, &held.request);
    if (result != BLUEFOG_UCX_PENDING) Received(held.request, result == BLUEFOG_UCX_DONE);
  }
}

void Link::Received(const Request& request, bool ok) {
  Held& held = held_[request.index];
  held.destination = nullptr;
  fetching_bytes_ -= held.view.size;
  Status status = absl::OkStatus();
  if (held.revoked) {
    status = absl::CancelledError("the sender gave up the message");
  } else if (!ok) {
    status = absl::UnavailableError("rank " + std::to_string(rank_) + " is gone");
  } else {
    AdaptWindow(held.view.size, NowNs() - held.begin_ns);
  }
  self_->fetched.push_back({held.cookie, std::move(status)});
}

// A small message waits behind what is in flight, and a queue in the network gains nothing (at 1
// Gb/s twice the window even costs 7 %): so much as the way holds and a little more. What a fetch
// takes beyond the least one is its time in queues.
void Link::AdaptWindow(int64_t bytes, int64_t took_ns) {
  least_fetch_ns_ = std::min(least_fetch_ns_, took_ns);
  const bool queued = took_ns > least_fetch_ns_ + std::max(kQueueNs, least_fetch_ns_ / 2);
  if (!queued && fetch_waiting_.empty()) return;  // Not the window holds it up.
  fetch_window_ = std::clamp(fetch_window_ + (queued ? -bytes : bytes) / 4,
                             self_->options.fetch_window, self_->options.fetch_window_max);
}

void Link::Take(Held* held) {
  if (held->large || std::exchange(held->detached, true)) return;
  taken_ += held->view.size;
  self_->Unuse(held->buffer);
}

void Link::Detach(const View& view) {
  if (Held* held = Find(view); held != nullptr) Take(held);
}

void Link::Release(const View& view) {
  Held* held = Find(view);
  if (held == nullptr) return;
  Take(held);
  if (held->arrival != nullptr) self_->api->drop(self_->ucx, std::exchange(held->arrival, nullptr));
  held->used = false;
  if (peer_ != nullptr) releases_.push_back(static_cast<uint32_t>(view.token));
}

bool Link::Intact(const View& view) const {
  const Held* held = Find(view);
  return held != nullptr && !held->revoked;
}

void Link::RevokeAllHeld() {
  for (Held& held : held_) held.revoked = true;
}

}  // namespace bluefog::transport::ucx
