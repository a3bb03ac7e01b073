/* Border between the core and the UCX component (libbluefog_ucx.so, which alone links UCX). C types
 * only; whoever allocates frees; no exception crosses. All calls are made by whoever holds the
 * engine's progress lock, one at a time; all callbacks come from inside `progress`. */
#ifndef BLUEFOG_UCX_ABI_H_
#define BLUEFOG_UCX_ABI_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLUEFOG_UCX_ABI_VERSION 1

typedef struct bluefog_ucx bluefog_ucx;           /* A worker: what this rank hears with. */
typedef struct bluefog_ucx_peer bluefog_ucx_peer; /* An endpoint: the way to one peer. */

/* How an operation ended. */
typedef enum bluefog_ucx_result {
  BLUEFOG_UCX_DONE = 0,
  BLUEFOG_UCX_PENDING = 1,     /* A callback follows. */
  BLUEFOG_UCX_UNREACHABLE = 2, /* Nobody listens there, or it refuses. */
  BLUEFOG_UCX_BROKEN = 3,      /* The connection broke. */
  BLUEFOG_UCX_STARVED = 4,     /* No memory or descriptors here. */
  BLUEFOG_UCX_FAILED = 5
} bluefog_ucx_result;

/* Pointers that a callback gets live for the call, but `arrival`. */
typedef struct bluefog_ucx_events {
  void* user;
  /* A message. Sent eagerly: `data` holds `bytes` bytes, of any alignment, and `arrival` is null.
   * Else it still lies with its sender: `arrival` is given once, later, to receive or drop. */
  void (*message)(void* user, const void* header, int64_t header_bytes, const void* data,
                  int64_t bytes, void* arrival);
  /* What a pending send or receive came to: `request` as it was given. */
  void (*sent)(void* user, void* request, int32_t result);
  void (*received)(void* user, void* request, int32_t result);
  /* At most once per peer. Its pending requests are still called back, at disconnect at the latest.
   */
  void (*peer_down)(void* user, void* peer_user, int32_t result, const char* text);
} bluefog_ucx_events;

/* Where error texts go: cut to `capacity`, always terminated. */
typedef struct bluefog_ucx_error {
  int32_t result;
  char* text;
  int64_t capacity;
} bluefog_ucx_error;

typedef struct bluefog_ucx_options {
  uint32_t struct_size;
  const char* transports; /* UCX_TLS; null: as the environment says, tcp where it does not. */
  const char* devices;    /* UCX_NET_DEVICES; null: as the environment says. */
  bluefog_ucx_events events;
} bluefog_ucx_options;

typedef struct bluefog_ucx_api {
  uint32_t struct_size;
  uint32_t abi_version;
  bluefog_ucx* (*open)(const bluefog_ucx_options* options, bluefog_ucx_error* error);
  /* After every peer was disconnected. Null is allowed. */
  void (*close)(bluefog_ucx* ucx);
  /* What a peer needs to connect. Valid until close. */
  const void* (*address)(bluefog_ucx* ucx, int64_t* bytes);
  /* Does not wait for the other side. */
  bluefog_ucx_peer* (*connect)(bluefog_ucx* ucx, const void* address, int64_t bytes,
                               void* peer_user, bluefog_ucx_error* error);
  /* Ends it at once; pending requests are called back from inside. The peer is not told. */
  void (*disconnect)(bluefog_ucx_peer* peer);
  /* Header and data must stay as they are until the send is done. `lies` not 0: the data stays here
   * until the peer receives or drops it. */
  int32_t (*send)(bluefog_ucx_peer* peer, const void* header, int64_t header_bytes,
                  const void* data, int64_t bytes, int32_t lies, void* request);
  int32_t (*receive)(bluefog_ucx* ucx, void* arrival, void* destination, int64_t bytes,
                     void* request);
  /* The sender's send is done, as if it had been received. */
  void (*drop)(bluefog_ucx* ucx, void* arrival);
  /* Not 0: something moved. */
  int32_t (*progress)(bluefog_ucx* ucx);
  /* A descriptor that polls readable after arm() when there is work. arm() returns 0 if there is
   * some already: call progress. */
  int32_t (*fd)(bluefog_ucx* ucx);
  int32_t (*arm)(bluefog_ucx* ucx);
  /* Version of UCX, for `bluefog info`. Static. */
  const char* (*describe)(void);
} bluefog_ucx_api;

/* The one symbol of the component. */
const bluefog_ucx_api* bluefog_ucx_factory(void);

#ifdef __cplusplus
}
#endif
#endif /* BLUEFOG_UCX_ABI_H_ */
