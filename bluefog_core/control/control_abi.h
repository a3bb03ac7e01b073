/* Border between the core and the control-plane component (libbluefog_control.so, which alone links
 * gRPC and protobuf). C types only; whoever allocates frees; no exception crosses. */
#ifndef BLUEFOG_CONTROL_ABI_H_
#define BLUEFOG_CONTROL_ABI_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BLUEFOG_CONTROL_ABI_VERSION 2

typedef struct bluefog_control bluefog_control;

/* Calls back into the core from threads of the component, or of the caller of join. `text` lives
 * for the call. None may call leave or destroy. All must be given. */
typedef struct bluefog_control_events {
  void* user;
  /* A rank of the job died, went silent, or gave up; at most once per rank. The rank's own number
   * when the others have declared this process dead. */
  void (*rank_failed)(void* user, int32_t rank, const char* text);
  /* A rank left in good order. */
  void (*rank_left)(void* user, int32_t rank);
  /* Read at every heartbeat: operations done so far. */
  int64_t (*progress)(void* user);
  /* Worth a warning, no failure (a rank has been silent for suspect_ms). */
  void (*notice)(void* user, const char* text);
  /* Asked about every 100 ms by the thread that is in join; not 0: give up. */
  int32_t (*interrupted)(void* user);
} bluefog_control_events;

typedef struct bluefog_control_options {
  uint32_t struct_size;
  const char* job_id;
  int32_t rank, size;
  int32_t embed_server;    /* Rank 0: serve at `coordinator` as well. */
  const char* coordinator; /* host:port */
  const void* token;       /* The job's secret; token_bytes may be 0. */
  int64_t token_bytes;
  int32_t launcher_reports; /* The launcher calls report_death for this rank. */
  const void* address;      /* This rank's entry of the address book: opaque bytes. */
  int64_t address_bytes;
  uint64_t fingerprint; /* Version, ABI and configuration that must be equal on all ranks. */
  const char* fingerprint_text; /* The same for people. */
  int32_t join_timeout_ms, heartbeat_ms, suspect_ms, dead_ms;
  bluefog_control_events events;
} bluefog_control_options;

/* For report_death, of a launcher: no rank. */
typedef struct bluefog_control_death {
  uint32_t struct_size;
  const char* job_id;
  const char* coordinator; /* host:port */
  const void* token;
  int64_t token_bytes;
  int32_t rank; /* Whose process ended. */
  int32_t timeout_ms;
  const char* text; /* Why: "killed by SIGKILL". */
} bluefog_control_death;

/* Where error texts go: cut to `capacity`, always terminated. */
typedef struct bluefog_control_error {
  int32_t code; /* absl::StatusCode */
  char* text;
  int64_t capacity;
} bluefog_control_error;

typedef struct bluefog_control_api {
  uint32_t struct_size;
  uint32_t abi_version;
  /* Blocks until all ranks have joined; null and *error otherwise. Events may come before it
   * returns. */
  bluefog_control* (*join)(const bluefog_control_options* options, bluefog_control_error* error);
  /* Address of `rank` as it gave it at join. Valid until destroy. */
  const void* (*address)(bluefog_control* control, int32_t rank, int64_t* bytes);
  /* Tells everybody that `rank` failed (seen by this one). */
  void (*report_failure)(bluefog_control* control, int32_t rank, const char* text);
  /* Tells everybody that this rank leaves in good order. No callback runs afterwards. Answers
   * within dead_ms also when the server does not. */
  void (*leave)(bluefog_control* control);
  /* Without leave before it the others are told that this rank failed. Null is allowed. */
  void (*destroy)(bluefog_control* control);
  /* Messages sent so far without heartbeats, and heartbeats. */
  void (*counters)(bluefog_control* control, int64_t* messages, int64_t* heartbeats);
  /* Tells the job that the process of a rank has ended, from outside the job; error->code is 0 when
   * it was told. Blocks for at most timeout_ms. */
  void (*report_death)(const bluefog_control_death* death, bluefog_control_error* error);
  /* Versions of the libraries inside, for `bluefog info`. Static. */
  const char* (*describe)(void);
} bluefog_control_api;

/* The one symbol of the component. */
const bluefog_control_api* bluefog_control_factory(void);

#ifdef __cplusplus
}
#endif
#endif /* BLUEFOG_CONTROL_ABI_H_ */
