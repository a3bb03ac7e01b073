// The client's end of a stream: messages go out one after the other, and what comes is handed on.
// Without a thread of its own: callbacks run on gRPC's few, one at a time for a stream.
#pragma once

#include <grpcpp/grpcpp.h>

#include <deque>
#include <functional>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "bluefog/v1/control.grpc.pb.h"

namespace bluefog::control {

template <typename Out, typename In>
class ClientStream final : public grpc::ClientBidiReactor<Out, In> {
 public:
  using Method = void (v1::Control::Stub::async::*)(grpc::ClientContext*,
                                                    grpc::ClientBidiReactor<Out, In>*);

  /// `ended` comes last, exactly once after Start.
  ClientStream(const std::shared_ptr<grpc::Channel>& channel, std::function<void(const In&)> came,
               std::function<void(const grpc::Status&)> ended)
      : stub_(v1::Control::NewStub(channel)), came_(std::move(came)), ended_(std::move(ended)) {}
  /// Cancels what still runs; no callback afterwards. Not to be called by one.
  ~ClientStream() override {
    context_.TryCancel();
    MutexLock lock(mu_);
    while (started_ && !done_) changed_.Wait(mu_);
  }
  ClientStream(const ClientStream&) = delete;
  ClientStream& operator=(const ClientStream&) = delete;

  void Start(Method method) {
    {
      MutexLock lock(mu_);
      started_ = true;
    }
    (stub_->async()->*method)(&context_, this);
    this->StartRead(&in_);
    this->StartCall();
  }
  /// False if the stream is over; with `skip` also if an earlier message is still on its way.
  bool Send(Out message, bool skip = false) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    if (over_ || closing_ || (skip && !queue_.empty())) return false;
    queue_.push_back(std::move(message));
    Pump();
    return true;
  }
  /// Nothing more will be sent.
  void Close() EXCLUDES(mu_) {
    MutexLock lock(mu_);
    closing_ = true;
    Pump();
  }
  void Cancel() { context_.TryCancel(); }

  void OnReadDone(bool ok) override {
    if (ok) {
      came_(in_);
      return this->StartRead(&in_);
    }
    // Until here a read was under way, which keeps gRPC from being done with this object.
    MutexLock lock(mu_);
    over_ = true;
  }
  void OnWriteDone(bool) override {
    MutexLock lock(mu_);
    writing_ = false;
    queue_.pop_front();
    Pump();
  }
  void OnDone(const grpc::Status& status) override {
    ended_(status);
    MutexLock lock(mu_);
    done_ = true;
    changed_.NotifyAll();
  }

 private:
  void Pump() REQUIRES(mu_) {
    if (over_ || writing_) return;
    if (!queue_.empty()) {
      writing_ = true;
      this->StartWrite(&queue_.front());
    } else if (closing_ && !closed_) {
      closed_ = true;
      this->StartWritesDone();
    }
  }

  const std::unique_ptr<v1::Control::Stub> stub_;
  const std::function<void(const In&)> came_;
  const std::function<void(const grpc::Status&)> ended_;
  grpc::ClientContext context_;
  In in_;
  Mutex mu_;
  CondVar changed_;
  std::deque<Out> queue_ GUARDED_BY(mu_);
  bool writing_ GUARDED_BY(mu_) = false;
  bool closing_ GUARDED_BY(mu_) = false;
  bool closed_ GUARDED_BY(mu_) = false;
  bool started_ GUARDED_BY(mu_) = false;
  bool over_ GUARDED_BY(mu_) = false;
  bool done_ GUARDED_BY(mu_) = false;
};

}  // namespace bluefog::control
