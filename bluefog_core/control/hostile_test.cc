// Strangers, and ranks gone wrong, at the control plane's socket, while a job of two ranks runs on.
#include <gmock/gmock.h>
#include <grpcpp/create_channel_posix.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <random>
#include <thread>

#include "base/clock.h"
#include "base/port.h"
#include "base/token.h"
#include "control/client.h"
#include "control/door.h"
#include "control/server.h"
#include "control/socket.h"

namespace bluefog::control {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

constexpr int64_t kLongNs = 20'000 * kMillisecond;
const auto never = [] { return false; };

/// A connection of somebody who does what he likes.
class Raw {
 public:
  explicit Raw(int fd) : fd_(fd) {}
  explicit Raw(const std::string& coordinator)
      : fd_(ConnectTo(*ResolveEndpoint(coordinator), 10'000).value_or(-1)) {}
  ~Raw() { close(fd_); }
  bool Send(const std::string& bytes) {
    for (size_t done = 0; done < bytes.size();) {
      pollfd ready = {fd_, POLLOUT, 0};
      if (poll(&ready, 1, 5'000) != 1) return false;
      const ssize_t n = send(fd_, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
      if (n <= 0) return false;
      done += static_cast<size_t>(n);
    }
    return true;
  }
  /// What comes until the other end closes; *closed: it did, within `ms`.
  std::string Receive(int ms, bool* closed) {
    std::string all;
    const int64_t until = NowNs() + ms * kMillisecond;
    *closed = false;
    while (!*closed && NowNs() < until) {
      pollfd ready = {fd_, POLLIN, 0};
      if (poll(&ready, 1, 50) != 1) continue;
      char bytes[4096];
      const ssize_t n = recv(fd_, bytes, sizeof(bytes), 0);
      if (n > 0) all.append(bytes, static_cast<size_t>(n));
      *closed = n == 0 || (n < 0 && errno != EAGAIN);
    }
    return all;
  }
  bool Closed(int ms = 10'000) {
    bool closed;
    Receive(ms, &closed);
    return closed;
  }
  int fd() const { return fd_; }

 private:
  const int fd_;
};

class Hostile : public ::testing::TestWithParam<bool> {
 protected:
  Hostile() : token_(GetParam() ? RandomBytes(kTokenBytes).value() : "") {
    ServerOptions server;
    coordinator_ = "127.0.0.1:" + std::to_string(FreePort().value());
    server.coordinator = coordinator_;
    server.job_id = "job";
    server.token = token_;
    server.size = 2;
    server.heartbeat_ms = 50;
    server.suspect_ms = 10'000;
    server.dead_ms = 20'000;
    server.notice = [](const std::string&) {};
    server_ = Server::Start(server).value();
    std::thread threads[2];
    for (int r = 0; r < 2; ++r) {
      ClientOptions client;
      client.coordinator = coordinator_;
      client.caller = {"job", r, token_};
      client.join.set_rank(r);
      client.join.set_size(2);
      client.join.set_timeout_ms(20'000);
      client.serves = r == 0;
      client.heartbeat_ms = 50;
      client.suspect_ms = 10'000;
      client.dead_ms = 20'000;
      client.rank_failed = [this](int, const std::string&) { ++failed_; };
      client.rank_left = [](int) {};
      client.progress = [] { return int64_t{0}; };
      client.notice = [](const std::string&) {};
      client.interrupted = never;
      clients_[r] = std::make_unique<Client>(client);
      threads[r] = std::thread([this, r] { EXPECT_TRUE(clients_[r]->Join().ok()); });
    }
    for (std::thread& thread : threads) thread.join();
  }
  ~Hostile() override {
    EXPECT_EQ(failed_, 0);
    GoesOn();
    for (auto& client : clients_) client->Leave();
    server_->Close();
  }

  Caller Friend() const { return {"job", -1, token_}; }
  /// Heartbeats are answered, and who belongs to the job is let in.
  void GoesOn() {
    const int64_t before = clients_[1]->heartbeats(), until = NowNs() + kLongNs;
    while (clients_[1]->heartbeats() < before + 3 && NowNs() < until) usleep(1'000);
    EXPECT_GE(clients_[1]->heartbeats(), before + 3);
    StatusOr<int> fd = Dial(coordinator_, Friend(), NowNs() + kLongNs, never);
    ASSERT_TRUE(fd.ok()) << fd.status();
    close(*fd);
  }
  std::shared_ptr<grpc::Channel> Channel() {
    const int fd = Dial(coordinator_, Friend(), NowNs() + kLongNs, never).value();
    return grpc::CreateInsecureChannelFromFd("test", fd);
  }

  const std::string token_;
  std::string coordinator_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Client> clients_[2];
  std::atomic<int> failed_{0};
};
INSTANTIATE_TEST_SUITE_P(Token, Hostile, ::testing::Bool());

TEST_P(Hostile, WhatIsNoHandshakeIsClosedAtOnce) {
  std::mt19937 random(1);
  std::string noise(1 << 20, '\0');
  for (char& c : noise) c = static_cast<char>(random());
  const std::string nonce(kNonceBytes, 'n');
  for (const std::string& bytes :
       {std::string("GET / HTTP/1.0\r\n\r\n"), noise,
        std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") + noise, std::string(100, '\0'),
        std::string("BFCTRL02") + nonce, "BFCTRL01" + nonce + std::string("\0\0\0\0\xff\xff", 6)}) {
    Raw raw(coordinator_);
    raw.Send(bytes);
    bool closed;
    EXPECT_EQ(raw.Receive(3'000, &closed), "");
    EXPECT_TRUE(closed) << bytes.substr(0, 10);
  }
  for (int i = 0; i < 50; ++i) Raw(coordinator_).Send("BFCTR");  // And away.
}

TEST_P(Hostile, AProofThatIsWrongOrTooLongAgo) {
  for (const Caller& caller :
       {Caller{"job", 1, RandomBytes(kTokenBytes).value()}, Caller{"job", 1, token_ + "x"}}) {
    EXPECT_EQ(Dial(coordinator_, caller, NowNs() + kLongNs, never).status().code(),
              absl::StatusCode::kUnauthenticated);
  }
  // What was heard on one connection does not open another: the nonce differs.
  const std::string hello =
      "BFCTRL01" + std::string(kNonceBytes, 'n') + std::string("\x01\0\0\0\x03\0job", 9);
  std::string nonces[2];
  for (std::string& nonce : nonces) {
    Raw raw(coordinator_);
    ASSERT_TRUE(raw.Send(hello));
    bool closed;
    const std::string challenge = raw.Receive(300, &closed);
    ASSERT_EQ(challenge.size(), 8 + kNonceBytes + kProofBytes);
    nonce = challenge.substr(8, kNonceBytes);
    const bool replay = &nonce == &nonces[1];
    raw.Send(Prove(token_, "control client", "rank 1 of job job", replay ? nonces[0] : nonce));
    const std::string verdict = raw.Receive(replay ? 3'000 : 300, &closed);
    ASSERT_GE(verdict.size(), 3u);
    EXPECT_EQ(verdict[0] != 0, replay);
    EXPECT_EQ(closed, replay);
  }
}

TEST_P(Hostile, ThousandsOfHalfOpenConnections) {
  const auto descriptors = [] {
    size_t n = 0;
    for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator("/proc/self/fd")) ++n;
    return n;
  };
  const size_t before = descriptors();
  std::vector<std::unique_ptr<Raw>> raws;
  for (int i = 0; i < 3'000; ++i) {
    raws.push_back(std::make_unique<Raw>(coordinator_));
    if (i % 2 == 0) raws.back()->Send("BFCTRL01");
  }
  GoesOn();
  EXPECT_LE(descriptors(), before + raws.size() + 600);
  for (auto& raw : raws) EXPECT_TRUE(raw->Closed());
}

TEST_P(Hostile, WhoSpeaksTooSlowlyIsGivenUp) {
  Raw raw(coordinator_);
  const int64_t start = NowNs();
  bool closed = false;
  for (const char c : "BFCTRL01" + std::string(kNonceBytes, 'n')) {
    if (closed) break;
    raw.Send(std::string(1, c));
    raw.Receive(200, &closed);
  }
  EXPECT_TRUE(closed);
  EXPECT_LT(NowNs() - start, 8'000 * kMillisecond);
}

TEST_P(Hostile, JunkBehindTheHandshake) {
  std::mt19937 random(2);
  for (const char* begin : {"", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}) {
    std::string junk = begin;
    for (int i = 0; i < 10'000; ++i) junk += static_cast<char>(random() | 0x80);
    Raw raw(Dial(coordinator_, Friend(), NowNs() + kLongNs, never).value());
    raw.Send(junk);
    EXPECT_TRUE(raw.Closed());
  }
}

TEST_P(Hostile, MessagesOutOfOrderAndOversized) {
  auto stub = v1::Control::NewStub(Channel());
  const auto end = [&](const std::vector<v1::FromRank>& messages) {
    grpc::ClientContext context;
    auto stream = stub->Session(&context);
    for (const v1::FromRank& message : messages) stream->Write(message);
    v1::ToRank answer;
    while (stream->Read(&answer)) {
    }
    return stream->Finish();
  };
  v1::FromRank leave, report, empty, join, huge;
  leave.mutable_leave();
  report.mutable_report_failure()->set_rank(1);
  for (const v1::FromRank& first : {leave, report, empty}) {
    EXPECT_EQ(end({first}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  join.mutable_join()->set_rank(1);
  join.mutable_join()->set_size(2);
  EXPECT_EQ(end({join}).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  join.mutable_join()->set_rank(INT32_MIN);
  EXPECT_EQ(end({join}).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  huge.mutable_join()->set_address(std::string(8 << 20, 'x'));
  EXPECT_EQ(end({huge}).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);

  grpc::ClientContext context;
  auto beats = stub->Heartbeats(&context);
  v1::Heartbeat beat;
  beat.set_rank(2);
  beats->Write(beat);
  v1::Pulse pulse;
  EXPECT_FALSE(beats->Read(&pulse));
  beats->Finish();
}

TEST(Protocol, WhateverComesTheReceptionStands) {
  const std::string job = "job", token(kTokenBytes, 't');
  std::mt19937 random(3);
  for (int i = 0; i < 2'000; ++i) {
    int fds[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
    Reception reception(fds[0], job, token);
    std::string bytes = "BFCTRL01" + std::string(kNonceBytes, 'n') +
                        std::string("\x01\0\0\0\x03\0job", 9) + std::string(kProofBytes, 'p');
    for (unsigned n = random() % 4; n > 0; --n) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    bytes.resize(random() % (bytes.size() + 1));
    Reception::Result result = Reception::Result::kWaiting;
    for (size_t done = 0; done < bytes.size() && result == Reception::Result::kWaiting;) {
      const size_t n = std::min<size_t>(1 + random() % 40, bytes.size() - done);
      ASSERT_EQ(write(fds[1], bytes.data() + done, n), static_cast<ssize_t>(n));
      done += n;
      result = reception.Receive();
    }
    EXPECT_NE(result, Reception::Result::kWelcome);
    close(fds[1]);
    if (result == Reception::Result::kWaiting) {
      EXPECT_EQ(reception.Receive(), Reception::Result::kStranger);
    }
    close(fds[0]);
  }
}

}  // namespace
}  // namespace bluefog::control
