/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef PINBROKER_H
#define PINBROKER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * libpinbroker: long-term pins of file pages, and letting go of them when asked.
 *
 * A program that registers file memory with hardware opens the file through the broker, hands over
 * the context that will hold the pins (an RDMA device context, an AF_XDP socket, an io_uring …) and
 * announces each region before it registers it. While the pins live, nobody can take the pages
 * away: whoever tries waits, and the holder gets a notice and has until its deadline to let go.
 *
 *     pinbroker_new, pinbroker_set_revoke_callback, pinbroker_connect
 *     pinbroker_open_file, pinbroker_add_context
 *     per region: pinbroker_pin, registration with the hardware, pinbroker_bind
 *     whenever pinbroker_get_fd() is readable: pinbroker_dispatch, which runs the callback
 *     in the callback: pinbroker_unpin and deregistration, in the order told at pinbroker_unpin()
 *     pinbroker_remove_context, pinbroker_close_file, pinbroker_unref
 *
 * Returns. Every int is 0 (or what is said) on success and a negative errno on failure; outputs
 * ("ret_…") are untouched on failure, and may be NULL where that is said. pinbroker_last_error()
 * has the sentence. The broker's refusals:
 *
 *     -EMEDIUMTYPE  the file cannot be leased, so not pinned safely   (NotLeasable)
 *     -EBUSY        something stands in the way for now               (Busy)
 *     -EAGAIN       the range is being revoked, try again afterwards  (RangeConflict)
 *     -EACCES       the caller may not do this                        (NotAllowed)
 *     -ENOENT       no such client, file, context, pin or revocation  (NoSuchObject)
 *     -EDQUOT       a limit in pinbroker.conf is reached              (LimitExceeded)
 *     -ESTALE       the pins were, or are being, revoked, or the file
 *                   or context was withdrawn: open or add it anew     (Revoked)
 *     -ERANGE       the range does not lie within the file            (BeyondEndOfFile)
 *     -EOPNOTSUPP   not supported for this file, context or kernel    (NotSupported)
 *     -EINVAL       a parameter makes no sense                        (InvalidParameter)
 *     -ENOSYS       this broker is too old for the call               (MethodNotFound)
 *     -EREMOTEIO    a refusal that this library does not know
 *
 * Any call can also fail with:
 *
 *     -ENOTCONN     pinbroker_connect() has not succeeded yet
 *
 *     -EISCONN      it has already, and this can only be done before
 *
 *     -ENOTRECOVERABLE  the broker has forgotten this client (it was restarted without its state, or
 *                   all connections broke at a time when it had no pins): nothing protects its pins
 *                   any more. Let go of all of them, drop the handle and start anew
 *
 *     -ECONNRESET   the connection broke, or memory ran out, after the call had been sent: whether it
 *                   was done is not known (pinbroker_list_pins() tells). The handle has reconnected,
 *                   or will
 *
 *     -ETIMEDOUT    the broker does not answer: it is stopped, or hangs; likewise
 *
 *     -ECHILD       the handle was made by another process, see below
 *
 *     -EPROTO       the broker's answer makes no sense
 *
 *     -ENOMEM       nothing was done
 *
 * or what socket(2) and connect(2) return, while the broker is away.
 *
 * Where one number stands for several things, pinbroker_last_error() tells them apart: its name is
 * NULL for whatever is not a refusal.
 *
 * Threads. Calls may be made from several threads; those that need the broker's answer are made one
 * after the other. They wait for it for 30 s, or as long as $PINBROKER_TIMEOUT says, in seconds,
 * and four times that where a file is opened; signals do not interrupt them. pinbroker_dispatch()
 * is for one thread at a time. Callbacks run in it, with no lock held: they may make any call but
 * pinbroker_dispatch(), and release the handle. Setters are for the time before
 * pinbroker_connect(), by one thread.
 *
 * fork(). The child must not use the handle: every call returns -ECHILD there (or NULL, and
 * pinbroker_last_error() and what is asked of files and contexts alone still answer). The _unref()
 * and _free() functions may be called: they tell the broker nothing, wait for nothing, and release
 * what the child has copies of. If another thread was using the handle at the time of the fork()
 * some of it remains until exec() or exit(). A child may make a handle of its own. Its copies of
 * files, mappings and contexts keep those alive: exec(), or close and unmap them.
 *
 * Units. Offsets and lengths are bytes, times and deadlines ("…_usec") microseconds of
 * CLOCK_MONOTONIC: deadlines as it is here, also in a time namespace, other times as it is for
 * the broker. Ids are the broker's, positive and never reused.
 */

/* An id, size or time that is not known. */
#define PINBROKER_UNKNOWN UINT64_MAX
/* A uid that is not known. */
#define PINBROKER_NO_UID ((uid_t)-1)

typedef struct pinbroker pinbroker;                 /* a client of the broker */
typedef struct pinbroker_file pinbroker_file;       /* a file opened through it */
typedef struct pinbroker_context pinbroker_context; /* what holds pins in the kernel */

/* What a file is opened for, or what the hardware may do with the pinned pages. */
enum pinbroker_access {
	PINBROKER_READ,
	PINBROKER_WRITE,
};

/* What shows that a pin is gone, best first. */
enum pinbroker_proof {
	PINBROKER_PROOF_PROVABLE, /* the kernel no longer lists it */
	PINBROKER_PROOF_CLAIMED,  /* the holder, or the kernel's return value, says so */
	PINBROKER_PROOF_PRESUMED, /* the holder is dead or has closed the context, nobody else was found
				     with it, and the kernel's counters do not contradict */
};

/* Why pages are wanted. */
enum pinbroker_cause {
	PINBROKER_CAUSE_MODIFY,   /* opened for writing or truncated, not known yet which */
	PINBROKER_CAUSE_TRUNCATE, /* truncated */
	PINBROKER_CAUSE_OPEN,     /* opened for writing */
	PINBROKER_CAUSE_SHRINK,   /* was truncated, or lost pages, where no lease held that up: let go at
				     once */
	PINBROKER_CAUSE_ADMIN,    /* an administrator's word */
	PINBROKER_CAUSE_DEVICE,   /* the context's device is going away */
	PINBROKER_CAUSE_SHUTDOWN, /* the broker is ending */
	PINBROKER_CAUSE_LOST,     /* nobody's: a restart of the broker lost these pins, or the file, which
				     nothing protects any more: let go at once, and open it anew */
};

enum pinbroker_lease_state {
	PINBROKER_LEASE_NONE,
	PINBROKER_LEASE_READ,     /* broken by writers */
	PINBROKER_LEASE_WRITE,    /* broken by readers too */
	PINBROKER_LEASE_SETTLING, /* a write lease that is about to become … */
	PINBROKER_LEASE_SETTLED,  /* … one on a writable description, broken by writers only */
	PINBROKER_LEASE_BREAKING, /* given up when the pins are gone */
};

/* What the pages of a file live on. */
enum pinbroker_backing {
	PINBROKER_BACKING_PAGE_CACHE, /* memory that the kernel writes back to a device */
	PINBROKER_BACKING_TMPFS,
	PINBROKER_BACKING_HUGETLBFS,
	PINBROKER_BACKING_FSDAX,      /* the blocks of a persistent memory */
	PINBROKER_BACKING_DEVICE_DAX, /* a device of memory, /dev/daxX.Y: it needs no lease */
};

/* Whether the kernel makes long-term pins of pages. */
enum pinbroker_pinnable {
	PINBROKER_PINNABLE_NO,
	PINBROKER_PINNABLE_YES,
	PINBROKER_PINNABLE_UNKNOWN, /* it depends on the kernel */
};

enum pinbroker_pin_state {
	PINBROKER_PIN_RESERVED, /* no handle bound yet */
	PINBROKER_PIN_BOUND,
	PINBROKER_PIN_LEAVING, /* unpinned, not yet seen to be gone */
};

enum pinbroker_revocation_state {
	PINBROKER_REVOCATION_NOTIFIED,  /* the holders have until the deadline */
	PINBROKER_REVOCATION_DETACHING, /* pins are being detached by force */
	PINBROKER_REVOCATION_SIGNALLED, /* the holders that remain have been sent the signal */
	PINBROKER_REVOCATION_KILLED,    /* … SIGKILL */
	PINBROKER_REVOCATION_RELEASED,  /* ended: every pin is gone */
	PINBROKER_REVOCATION_LOST,      /* ended, with pins alive */
};

/* The words of the protocol for these values ("read", "claimed", "truncate", …); NULL for a value
 * that is none of them. */
const char *pinbroker_access_name(enum pinbroker_access access);
const char *pinbroker_proof_name(enum pinbroker_proof proof);
const char *pinbroker_cause_name(enum pinbroker_cause cause);
const char *pinbroker_lease_state_name(enum pinbroker_lease_state state);
const char *pinbroker_backing_name(enum pinbroker_backing backing);
const char *pinbroker_pinnable_name(enum pinbroker_pinnable pinnable);
const char *pinbroker_pin_state_name(enum pinbroker_pin_state state);
const char *pinbroker_revocation_state_name(enum pinbroker_revocation_state state);

/* ---- Structures. Later versions may add members at the end of those that the library fills. ----
 */

struct pinbroker_range {
	uint64_t offset;
	uint64_t length; /* at least 1 */
};

struct pinbroker_error {
	int error;           /* as returned, a negative errno; 0: no call has failed */
	const char *name;    /* "org.pinbroker.Busy"; NULL: the call failed on this side */
	const char *message; /* what failed, and what to do: a sentence, or several */
	const char *cause;   /* a short word for programs (NotLeasable, Busy, NotAllowed,
				NotSupported); NULL otherwise */
	uint64_t until_usec; /* Busy: when to try again; otherwise PINBROKER_UNKNOWN */
	uint64_t revocation; /* Revoked, RangeConflict; otherwise PINBROKER_UNKNOWN */
};

/* Asks a holder to let go. Valid during the callback. */
struct pinbroker_notice {
	uint64_t revocation;
	uint64_t client; /* this one */
	uint64_t file;
	const char *path;
	const uint64_t *pins; /* those to let go of; an update names again what has not gone yet, or others: of very many
				 some are named at a time */
	size_t n_pins;
	enum pinbroker_cause cause;
	uint64_t offset;        /* the range that is wanted … */
	uint64_t length;        /* … 0: to the end of the file */
	uint64_t size;          /* what the file is being truncated to, or PINBROKER_UNKNOWN */
	pid_t pid;              /* who wants it; 0: not known (yet) */
	uid_t uid;              /* PINBROKER_NO_UID: not known */
	const char *comm;       /* the name of that process, or NULL */
	const char *reason;     /* an administrator's words, what was done to the lease, or NULL */
	uint64_t deadline_usec; /* the broker goes on without the holder from then on */
	bool update; /* there was a notice of this revocation and file already; this one says more:
			who is behind it, why, or further pins */
};

struct pinbroker_file_info {
	uint64_t file;
	const char *path;
	const char *file_system;
	uint64_t device; /* st_dev */
	uint64_t inode;
	uint64_t size;
	enum pinbroker_access access; /* how the broker's own description is opened */
	enum pinbroker_lease_state lease;
	uint64_t settled_usec; /* when a settling lease will have settled, or PINBROKER_UNKNOWN */
	bool exposed;          /* pinned, but the lease cannot be held at present */
	uint64_t n_clients;
	uint64_t n_pins;
	enum pinbroker_backing backing;
	const char *device_name; /* the block device that it is on, or the device-DAX; or NULL */
	const char *nvdimm_namespace; /* that this device is on, or NULL */
	const char *nvdimm_region;    /* or NULL */
	uint64_t numa_node;           /* that these are near to, or PINBROKER_UNKNOWN */
};

struct pinbroker_pin_info {
	uint64_t pin;
	uint64_t client;
	uint64_t file;
	uint64_t context;
	const char *path;
	uint64_t offset;
	uint64_t length;
	enum pinbroker_access access;
	uint64_t handle;   /* PINBROKER_UNKNOWN: not bound */
	const char *label; /* or NULL */
	enum pinbroker_pin_state state;
	uint64_t revocation; /* PINBROKER_UNKNOWN: none is running */
	bool on_demand;      /* it holds no pages: nobody waits for it */
};

struct pinbroker_client_info {
	uint64_t client;
	pid_t pid;
	uid_t uid;
	const char *comm;
	const char *unit;     /* systemd's, or NULL */
	const char *name;     /* as given to pinbroker_new(), or NULL */
	const char *bus_name; /* or NULL */
	bool alive;           /* the process lives */
	bool connected;
	uint64_t n_files;
	uint64_t n_contexts;
	uint64_t n_pins;
	uint64_t pinned_bytes;
};

struct pinbroker_context_info {
	uint64_t context;
	uint64_t client;
	const char *kind;
	const char *device;         /* or NULL */
	const char *label;          /* or NULL */
	bool forcible;              /* pins can be detached by force through it */
	enum pinbroker_proof proof; /* the best that this context can give */
	uint64_t n_pins;
};

struct pinbroker_revocation_info {
	uint64_t revocation;
	uint64_t file;    /* PINBROKER_UNKNOWN: several */
	const char *path; /* NULL: several */
	enum pinbroker_cause cause;
	uint64_t offset;
	uint64_t length;    /* 0: to the end of the file */
	uint64_t size;      /* what the file is being truncated to, or PINBROKER_UNKNOWN */
	pid_t pid;          /* who; 0: not known */
	uid_t uid;          /* PINBROKER_NO_UID: not known */
	const char *comm;   /* or NULL */
	const char *reason; /* or NULL */
	enum pinbroker_revocation_state state;
	uint64_t start_usec;
	uint64_t deadline_usec;
	uint64_t end_usec; /* PINBROKER_UNKNOWN: it is running */
	uint64_t n_pins;            /* that have to go: without those on demand */
	uint64_t n_remaining;       /* of them, not yet gone */
	bool has_proof;             /* it has ended, and … */
	enum pinbroker_proof proof; /* … this is the weakest proof that a pin of it ended with */
};

struct pinbroker_preflight_info {
	const char *file_system;   /* or NULL */
	bool leasable;             /* pinbroker_open_file() would work */
	const char *reason;        /* why not, or NULL */
	bool dax;                  /* the file is really mapped without a page cache */
	uint64_t lease_break_usec; /* how long the kernel waits for a broken lease; 0: for ever */
	uint64_t settle_usec;      /* how long a write lease would hold up readers; 0: not at all */
	bool has_backing;          /* the next five are known; as in pinbroker_file_info */
	enum pinbroker_backing backing;
	const char *device_name;
	const char *nvdimm_namespace;
	const char *nvdimm_region;
	uint64_t numa_node;
	enum pinbroker_pinnable pinnable; /* the kernel would make long-term pins for this access */
	const char *pin_reason;           /* why not, or what it depends on; or NULL */
};

/* ---- The client ---- */

/*
 * Makes a client, not yet connected. name: what to show to people (NULL: nothing). socket_path:
 * NULL for $PINBROKER_SOCKET or else /run/pinbroker/org.pinbroker. Both are copied. The caller owns
 * the reference. -ENAMETOOLONG: the path does not fit into a socket address.
 */
int pinbroker_new(const char *name, const char *socket_path, pinbroker **ret);

/*
 * References. Files and contexts hold one. The last unref closes the connections: pins that have
 * not been let go of before, and their files and contexts, are kept by the broker until the process
 * ends, and nobody is told of revocations any more. From elsewhere than a callback it waits for a
 * callback that is running in the library's own thread, whose new references do not count. After it
 * no callback runs. Both take and return NULL; unref always returns NULL.
 */
pinbroker *pinbroker_ref(pinbroker *pb);
pinbroker *pinbroker_unref(pinbroker *pb);

/* How notices come. Each is sent on all channels, and passed on once. Default: both. */
enum pinbroker_channels {
	PINBROKER_CHANNEL_WATCH = 1 << 0, /* a second connection to the broker's socket */
	PINBROKER_CHANNEL_BUS = 1 << 1,   /* D-Bus signals to this process alone */
};

/*
 * Chooses the channels, 0 for none (a program that never pins). -EISCONN after pinbroker_connect().
 */
int pinbroker_set_channels(pinbroker *pb, unsigned channels);

/*
 * The address of the message bus, as in D-Bus's "unix:path=…". NULL (the default): $PINBROKER_BUS
 * or else the system bus. -EISCONN after pinbroker_connect().
 */
int pinbroker_set_bus_address(pinbroker *pb, const char *address);

/*
 * Whether pinbroker_connect() makes a thread that dispatches, so that callbacks run in it and the
 * caller need not call pinbroker_dispatch(), which then fails with -EBUSY. All signals are blocked
 * in that thread. It ends with the last reference. -EISCONN after pinbroker_connect().
 */
int pinbroker_set_thread(pinbroker *pb, bool thread);

/*
 * Called by pinbroker_dispatch() for every notice: let go of notice->pins (there may be none) with
 * pinbroker_unpin() by the deadline, here or later. There is no other acknowledgement. Without a callback notices are
 * thrown away. userdata is the caller's. May be changed at any time by the thread that dispatches.
 */
typedef void (*pinbroker_revoke_callback)(
	pinbroker *pb, const struct pinbroker_notice *notice, void *userdata);
int pinbroker_set_revoke_callback(
	pinbroker *pb, pinbroker_revoke_callback callback, void *userdata);

/*
 * Called once by pinbroker_dispatch() if the broker has forgotten this client (-ENOTRECOVERABLE
 * above), after the last notice. -EISCONN after pinbroker_connect().
 */
typedef void (*pinbroker_lost_callback)(pinbroker *pb, void *userdata);
int pinbroker_set_lost_callback(pinbroker *pb, pinbroker_lost_callback callback, void *userdata);

/*
 * Connects to the broker and introduces this client. The bus is given two seconds; where it takes
 * longer, or is away, it is joined later. -EISCONN: done already; -EBUSY: another thread is at it.
 * Also fails as pthread_create(3) does, with pinbroker_set_thread(). After a failure it may be
 * tried again.
 */
int pinbroker_connect(pinbroker *pb);

/*
 * A descriptor to poll for POLLIN, the same for the life of the handle, which owns it. Whenever it
 * is readable call pinbroker_dispatch(). Includes timers: no timeout is needed.
 */
int pinbroker_get_fd(pinbroker *pb);

/*
 * Takes in what has come, runs the callback for every new notice, and restores connections that
 * were lost. Waits for nothing, except that after the loss of the broker or of the bus it may wait
 * for the broker for up to two seconds. Returns the number of notices passed on; -EBUSY when called
 * from a callback, while another thread is in it, or with pinbroker_set_thread();
 * -ENOTRECOVERABLE as told above (after the notices, and on every call from then on). Lack of
 * memory is no failure: what could not be taken in is taken in later.
 */
int pinbroker_dispatch(pinbroker *pb);

/* This client's id. */
int pinbroker_get_client(pinbroker *pb, uint64_t *ret);

/*
 * The broker's version, as it told it in pinbroker_connect(). Valid as long as the handle; NULL
 * before pinbroker_connect() has succeeded.
 */
const char *pinbroker_get_version(pinbroker *pb);

/* Returns 1 if the broker has the named feature, 0 if not. */
int pinbroker_has_feature(pinbroker *pb, const char *feature);

/*
 * Calls back for each of the broker's features, whose name is valid as long as the handle. What a
 * callback returns other than 0 ends the listing and is returned.
 */
int pinbroker_list_features(
	pinbroker *pb, int (*callback)(const char *feature, void *userdata), void *userdata);

/*
 * About the calling thread's last failed call on this handle; successful calls leave it. Never
 * NULL, also for a handle that is; valid until this thread's next call on any handle.
 */
const struct pinbroker_error *pinbroker_last_error(pinbroker *pb);

/* ---- Files ---- */

/*
 * Opens a file and puts it under the broker's lease, for access by the hardware and by this
 * process. The caller must own the file or be allowed to write it (the broker's Leases= has the
 * say), and should close its other descriptors of the file before: they can stand in the way of the
 * lease (-EBUSY). The caller owns *ret and lets it go with pinbroker_close_file(). Also fails as
 * open(2) does, without breaking anybody's lease. A file that this client has open already comes
 * with the same id, and closing either closes both for the broker: open it once.
 */
int pinbroker_open_file(
	pinbroker *pb, const char *path, enum pinbroker_access access, pinbroker_file **ret);
/* The same for a file that is open already, with O_PATH or (where the broker's
 * RequireOpenDescriptor= asks for it) in the ordinary way. fd remains the caller's. */
int pinbroker_open_file_fd(
	pinbroker *pb, int fd, enum pinbroker_access access, pinbroker_file **ret);

uint64_t pinbroker_file_get_id(const pinbroker_file *file);
/* The descriptor to map, read and write. It belongs to the file. Do not fcntl(F_SETLEASE) it. */
int pinbroker_file_get_fd(const pinbroker_file *file);
/* As it was when the file was opened. Valid as long as the file. */
const struct pinbroker_file_info *pinbroker_file_get_info(const pinbroker_file *file);

/*
 * Lets the file go and frees it, closing its descriptor. Unmap it first: a mapping keeps the
 * description open. On failure the file is as before; -EBUSY while pins of this client are on it.
 * Of those that were let go of the broker looks first whether they are gone.
 */
int pinbroker_close_file(pinbroker_file *file);
/* Frees without telling the broker: for when the handle is of no use any more. Accepts NULL,
 * returns NULL. */
pinbroker_file *pinbroker_file_free(pinbroker_file *file);

/* ---- Contexts ---- */

/*
 * Hands over what will hold the pins: the broker keeps a copy of fd, which remains the caller's.
 * label: to show to people, or NULL; copied. The caller owns *ret, and takes the context back with
 * pinbroker_remove_context(). -EBADF: fd is not open. After -ECONNRESET the broker may have a copy
 * that goes only with this process or its last connection.
 */
int pinbroker_add_context(pinbroker *pb, int fd, const char *label, pinbroker_context **ret);
/*
 * The same for what cannot be sent over a socket (an io_uring): the broker takes the copy out of
 * this process itself, with pidfd_getfd(2).
 */
int pinbroker_add_context_remote(pinbroker *pb, int fd, const char *label, pinbroker_context **ret);

uint64_t pinbroker_context_get_id(const pinbroker_context *context);
/* "io_uring", "af_xdp", "rdma", "vfio", or "opaque" for what the broker does not know; later versions
 * may know more. Valid as long as the context. */
const char *pinbroker_context_get_kind(const pinbroker_context *context);
/* The kernel's name of the device, or NULL. Valid as long as the context. */
const char *pinbroker_context_get_device(const pinbroker_context *context);
/* Whether pins can be detached by force through it. */
bool pinbroker_context_is_forcible(const pinbroker_context *context);
enum pinbroker_proof pinbroker_context_get_proof(const pinbroker_context *context);

/*
 * Takes a context back and frees the object. To be called before the context itself is closed: the
 * broker's copy keeps it, and all that it pins, alive. On failure the object is as before; -EBUSY
 * while pins are on it. Of those that were let go of the broker looks first whether they are gone.
 */
int pinbroker_remove_context(pinbroker_context *context);
/* Frees without telling the broker. Accepts NULL, returns NULL. */
pinbroker_context *pinbroker_context_free(pinbroker_context *context);

/* ---- Pins ---- */

/* Ranges in one pinbroker_pin(). */
#define PINBROKER_RANGES_MAX 1024

/*
 * Reserves a pin for each range, all or none. To be called before the registration with the
 * hardware: a conflict in between finds the reservation, and waits for it. label: to show to
 * people, or NULL; copied. access: no more than the file was opened for. ret_pins: room for
 * n_ranges ids, in the order of the ranges. -E2BIG: more than PINBROKER_RANGES_MAX; -EINVAL: none,
 * or an empty one.
 */
int pinbroker_pin(pinbroker *pb, const pinbroker_file *file, const pinbroker_context *context,
	const struct pinbroker_range *ranges, size_t n_ranges, enum pinbroker_access access,
	const char *label, uint64_t *ret_pins);

/*
 * The same for what pins no pages: an RDMA memory region with on-demand paging, which looks up each
 * page when it is used. The holder is told of conflicts in the same way, and should stop its peers from
 * using what goes away; but nobody waits for such pins, they count for no bytes, and they are never
 * detached by force. They go on, and so does what was registered, until they are let go of. A notice
 * that was missed is told again until pinbroker_bind(). The caller is believed: pages that are pinned all
 * the same are lost to what is written there.
 */
int pinbroker_pin_on_demand(pinbroker *pb, const pinbroker_file *file,
	const pinbroker_context *context, const struct pinbroker_range *ranges, size_t n_ranges,
	enum pinbroker_access access, const char *label, uint64_t *ret_pins);

/*
 * Tells the kernel's identifier of what was registered over a pin's range: the index of the fixed
 * buffer (io_uring), the handle of the memory region (RDMA), the iova (VFIO), otherwise any number
 * up to INT64_MAX.
 * Again after a re-registration. -ESTALE: the pin has been ended by force; deregister, and unpin.
 */
int pinbroker_bind(pinbroker *pb, uint64_t pin, uint64_t handle);

/*
 * Lets pins go. Where the context's proof is provable this comes first and the deregistration after
 * it: from then on the broker keeps its hands off the handle, and looks itself whether it is gone.
 * (In the moment of such a look, 10 ms later at the soonest, deregistering a memory region fails with
 * EBUSY: try again.) Where it is claimed, deregister first: this call is the claim.
 *
 * ret_ended: room for n_pins ids; gets those that were already destroyed by force, whose handle
 * must not be touched, because somebody else may have it by now. ret_n_ended: how many. Both may be
 * NULL. -ENOENT: one of them is no pin of this client (any more), and none has been let go of. More
 * than 1024 pins are let go of in portions; after a failure the earlier ones are gone.
 */
int pinbroker_unpin(pinbroker *pb, const uint64_t *pins, size_t n_pins, uint64_t *ret_ended,
	size_t *ret_n_ended);

/*
 * Asks for more time. The deadline moves by at most by_usec, and never past what the kernel grants.
 * ret_deadline_usec: the one now in force; may be NULL. -ENOENT: the revocation has ended, or is
 * not about pins of this client; -EBUSY: its time is over, and force is being used.
 */
int pinbroker_extend(
	pinbroker *pb, uint64_t revocation, uint64_t by_usec, uint64_t *ret_deadline_usec);

/* ---- Looking ---- */

/*
 * Lists objects of the caller's uid (root: all) through a callback, on a connection of its own: it
 * needs no pinbroker_connect(), and callbacks may make any call. The structure is valid during the
 * callback. What a callback returns other than 0 ends the listing and is returned. file, client: 0
 * for any. Of revocations the running ones and the latest ended ones are listed. On failure the
 * callback may have been called already.
 */
int pinbroker_list_pins(pinbroker *pb, uint64_t file, uint64_t client,
	int (*callback)(const struct pinbroker_pin_info *info, void *userdata), void *userdata);
int pinbroker_list_files(pinbroker *pb,
	int (*callback)(const struct pinbroker_file_info *info, void *userdata), void *userdata);
int pinbroker_list_clients(pinbroker *pb,
	int (*callback)(const struct pinbroker_client_info *info, void *userdata), void *userdata);
int pinbroker_list_contexts(pinbroker *pb, uint64_t client,
	int (*callback)(const struct pinbroker_context_info *info, void *userdata), void *userdata);
int pinbroker_list_revocations(pinbroker *pb,
	int (*callback)(const struct pinbroker_revocation_info *info, void *userdata),
	void *userdata);

/*
 * Tells what pinbroker_open_file() would do, without doing it; needs no pinbroker_connect(). fd: as
 * in pinbroker_open_file_fd(). The result is the caller's, to be freed with
 * pinbroker_preflight_free().
 */
int pinbroker_preflight(
	pinbroker *pb, int fd, enum pinbroker_access access, struct pinbroker_preflight_info **ret);
/* Accepts NULL, returns NULL. */
struct pinbroker_preflight_info *pinbroker_preflight_free(
	struct pinbroker_preflight_info *preflight);

#ifdef __cplusplus
}
#endif

#endif
