/* SPDX-License-Identifier: LGPL-2.1-or-later */
#pragma once

#include "schema.h"

/*
 * The interface org.pinbroker in C: each type, message and error declared once. What the fields
 * mean is said in org.pinbroker.varlink, to which a test holds these lists, field by field.
 */

#define PIN_RANGES_MAX 1024 /* ranges in one Pin call */

enum access { ACCESS_READ, ACCESS_WRITE };
enum proof { PROOF_PROVABLE, PROOF_CLAIMED, PROOF_PRESUMED };
enum cause {
	CAUSE_MODIFY,
	CAUSE_TRUNCATE,
	CAUSE_OPEN,
	CAUSE_SHRINK,
	CAUSE_ADMIN,
	CAUSE_DEVICE,
	CAUSE_SHUTDOWN,
	CAUSE_LOST,
};
enum lease_state {
	LEASE_NONE,
	LEASE_READ,
	LEASE_WRITE,
	LEASE_SETTLING,
	LEASE_SETTLED,
	LEASE_BREAKING,
};
enum backing_kind {
	BACKING_PAGE_CACHE,
	BACKING_TMPFS,
	BACKING_HUGETLBFS,
	BACKING_FSDAX,
	BACKING_DEVICE_DAX,
};
enum pinnable { PINNABLE_NO, PINNABLE_YES, PINNABLE_UNKNOWN };
enum pin_state { PIN_RESERVED, PIN_BOUND, PIN_LEAVING };
enum revocation_state {
	REVOCATION_NOTIFIED,
	REVOCATION_DETACHING,
	REVOCATION_SIGNALLED,
	REVOCATION_KILLED,
	REVOCATION_RELEASED,
	REVOCATION_LOST,
};

/* tag, name in the IDL, members in the order of the C enumeration */
#define INTERFACE_ENUMERATIONS(E)                                                              \
	E(access, Access, "read", "write")                                                     \
	E(proof, Proof, "provable", "claimed", "presumed")                                     \
	E(cause, Cause, "modify", "truncate", "open", "shrink", "admin", "device", "shutdown", \
		"lost")                                                                        \
	E(lease_state, LeaseState, "none", "read", "write", "settling", "settled", "breaking") \
	E(backing_kind, BackingKind, "pageCache", "tmpfs", "hugetlbfs", "fsdax", "deviceDax")  \
	E(pinnable, Pinnable, "no", "yes", "unknown")                                          \
	E(pin_state, PinState, "reserved", "bound", "leaving")                                 \
	E(revocation_state, RevocationState, "notified", "detaching", "signalled", "killed",   \
		"released", "lost")

#define RANGE_FIELDS(F)             \
	F(INT, REQUIRED, offset, _) \
	F(INT, REQUIRED, length, _)

#define CONFLICT_FIELDS(F)              \
	F(ENUM, REQUIRED, cause, cause) \
	F(INT, REQUIRED, offset, _)     \
	F(INT, REQUIRED, length, _)     \
	F(INT, NULLABLE, size, _)       \
	F(INT, NULLABLE, pid, _)        \
	F(INT, NULLABLE, uid, _)        \
	F(STRING, NULLABLE, comm, _)    \
	F(STRING, NULLABLE, reason, _)

#define NOTICE_FIELDS(F)                            \
	F(INT, REQUIRED, revocation, _)             \
	F(INT, REQUIRED, client, _)                 \
	F(INT, REQUIRED, file, _)                   \
	F(STRING, REQUIRED, path, _)                \
	F(INTS, REQUIRED, pins, _)                  \
	F(OBJECT, REQUIRED, conflict, msg_conflict) \
	F(INT, REQUIRED, deadlineUSec, _)

#define BACKING_FIELDS(F)                     \
	F(ENUM, REQUIRED, kind, backing_kind) \
	F(STRING, NULLABLE, deviceName, _)    \
	F(STRING, NULLABLE, namespace, _)     \
	F(STRING, NULLABLE, region, _)        \
	F(INT, NULLABLE, numaNode, _)

#define FILE_INFO_FIELDS(F)                       \
	F(INT, REQUIRED, file, _)                 \
	F(STRING, REQUIRED, path, _)              \
	F(STRING, REQUIRED, fileSystem, _)        \
	F(OBJECT, REQUIRED, backing, msg_backing) \
	F(INT, REQUIRED, device, _)               \
	F(INT, REQUIRED, inode, _)                \
	F(INT, REQUIRED, size, _)                 \
	F(ENUM, REQUIRED, access, access)         \
	F(ENUM, REQUIRED, lease, lease_state)     \
	F(INT, NULLABLE, settledUSec, _)          \
	F(BOOL, REQUIRED, exposed, _)             \
	F(INT, REQUIRED, clients, _)              \
	F(INT, REQUIRED, pins, _)

#define PIN_INFO_FIELDS(F)                  \
	F(INT, REQUIRED, pin, _)            \
	F(INT, REQUIRED, client, _)         \
	F(INT, REQUIRED, file, _)           \
	F(INT, REQUIRED, context, _)        \
	F(STRING, REQUIRED, path, _)        \
	F(INT, REQUIRED, offset, _)         \
	F(INT, REQUIRED, length, _)         \
	F(ENUM, REQUIRED, access, access)   \
	F(BOOL, REQUIRED, onDemand, _)      \
	F(INT, NULLABLE, handle, _)         \
	F(STRING, NULLABLE, label, _)       \
	F(ENUM, REQUIRED, state, pin_state) \
	F(INT, NULLABLE, revocation, _)

#define CLIENT_INFO_FIELDS(F)           \
	F(INT, REQUIRED, client, _)     \
	F(INT, REQUIRED, pid, _)        \
	F(INT, REQUIRED, uid, _)        \
	F(STRING, REQUIRED, comm, _)    \
	F(STRING, NULLABLE, unit, _)    \
	F(STRING, NULLABLE, name, _)    \
	F(STRING, NULLABLE, busName, _) \
	F(BOOL, REQUIRED, alive, _)     \
	F(BOOL, REQUIRED, connected, _) \
	F(INT, REQUIRED, files, _)      \
	F(INT, REQUIRED, contexts, _)   \
	F(INT, REQUIRED, pins, _)       \
	F(INT, REQUIRED, pinnedBytes, _)

#define CONTEXT_INFO_FIELDS(F)          \
	F(INT, REQUIRED, context, _)    \
	F(INT, REQUIRED, client, _)     \
	F(STRING, REQUIRED, kind, _)    \
	F(STRING, NULLABLE, device, _)  \
	F(STRING, NULLABLE, label, _)   \
	F(BOOL, REQUIRED, forcible, _)  \
	F(ENUM, REQUIRED, proof, proof) \
	F(INT, REQUIRED, pins, _)

#define REVOCATION_INFO_FIELDS(F)                   \
	F(INT, REQUIRED, revocation, _)             \
	F(INT, NULLABLE, file, _)                   \
	F(STRING, NULLABLE, path, _)                \
	F(OBJECT, REQUIRED, conflict, msg_conflict) \
	F(ENUM, REQUIRED, state, revocation_state)  \
	F(INT, REQUIRED, startUSec, _)              \
	F(INT, REQUIRED, deadlineUSec, _)           \
	F(INT, NULLABLE, endUSec, _)                \
	F(INT, REQUIRED, pins, _)                   \
	F(INT, REQUIRED, remaining, _)              \
	F(ENUM, NULLABLE, proof, proof)             \
	F(INT, NULLABLE, clients, _)

/* tag, name in the IDL, fields */
#define INTERFACE_TYPES(T)                                    \
	T(msg_range, Range, RANGE_FIELDS)                     \
	T(msg_conflict, Conflict, CONFLICT_FIELDS)            \
	T(msg_notice, Notice, NOTICE_FIELDS)                  \
	T(msg_backing, Backing, BACKING_FIELDS)               \
	T(msg_file_info, FileInfo, FILE_INFO_FIELDS)          \
	T(msg_pin_info, PinInfo, PIN_INFO_FIELDS)             \
	T(msg_client_info, ClientInfo, CLIENT_INFO_FIELDS)    \
	T(msg_context_info, ContextInfo, CONTEXT_INFO_FIELDS) \
	T(msg_revocation_info, RevocationInfo, REVOCATION_INFO_FIELDS)

#define HELLO_IN(F)                  \
	F(STRING, NULLABLE, name, _) \
	F(STRING, NULLABLE, busName, _)
#define HELLO_OUT(F)                    \
	F(INT, REQUIRED, client, _)     \
	F(STRING, REQUIRED, token, _)   \
	F(STRING, REQUIRED, version, _) \
	F(STRINGS, REQUIRED, features, _) \
	F(INT, NULLABLE, nowUSec, _)
#define RESUME_IN(F)                \
	F(INT, REQUIRED, client, _) \
	F(STRING, REQUIRED, token, _)
#define RESUME_OUT(F) F(OBJECTS, REQUIRED, notices, msg_notice)
#define OPEN_FILE_IN(F)                     \
	F(INT, REQUIRED, fileDescriptor, _) \
	F(ENUM, REQUIRED, access, access)
#define OPEN_FILE_OUT(F)                    \
	F(INT, REQUIRED, file, _)           \
	F(INT, REQUIRED, fileDescriptor, _) \
	F(OBJECT, REQUIRED, info, msg_file_info)
#define CLOSE_FILE_IN(F) F(INT, REQUIRED, file, _)
#define ADD_CONTEXT_IN(F)                     \
	F(INT, NULLABLE, fileDescriptor, _)   \
	F(INT, NULLABLE, remoteDescriptor, _) \
	F(STRING, NULLABLE, label, _)
#define ADD_CONTEXT_OUT(F)             \
	F(INT, REQUIRED, context, _)   \
	F(STRING, REQUIRED, kind, _)   \
	F(STRING, NULLABLE, device, _) \
	F(BOOL, REQUIRED, forcible, _) \
	F(ENUM, REQUIRED, proof, proof)
#define REMOVE_CONTEXT_IN(F) F(INT, REQUIRED, context, _)
#define PIN_IN(F)                               \
	F(INT, REQUIRED, file, _)               \
	F(INT, REQUIRED, context, _)            \
	F(OBJECTS, REQUIRED, ranges, msg_range) \
	F(ENUM, REQUIRED, access, access)       \
	F(BOOL, NULLABLE, onDemand, _)          \
	F(STRING, NULLABLE, label, _)
#define PIN_OUT(F) F(INTS, REQUIRED, pins, _)
#define BIND_IN(F)               \
	F(INT, REQUIRED, pin, _) \
	F(INT, REQUIRED, handle, _)
#define UNPIN_IN(F)  F(INTS, REQUIRED, pins, _)
#define UNPIN_OUT(F) F(INTS, REQUIRED, ended, _)
#define EXTEND_IN(F)                    \
	F(INT, REQUIRED, revocation, _) \
	F(INT, REQUIRED, byUSec, _)
#define EXTEND_OUT(F) F(INT, REQUIRED, deadlineUSec, _)
#define WATCH_IN(F)                 \
	F(INT, REQUIRED, client, _) \
	F(STRING, REQUIRED, token, _)
#define WATCH_OUT(F) F(OBJECT, REQUIRED, notice, msg_notice)
#define LIST_PINS_IN(F)           \
	F(INT, NULLABLE, file, _) \
	F(INT, NULLABLE, client, _)
#define LIST_PINS_OUT(F)        F(OBJECT, NULLABLE, pin, msg_pin_info)
#define LIST_FILES_OUT(F)       F(OBJECT, NULLABLE, file, msg_file_info)
#define LIST_CLIENTS_OUT(F)     F(OBJECT, NULLABLE, client, msg_client_info)
#define LIST_CONTEXTS_IN(F)     F(INT, NULLABLE, client, _)
#define LIST_CONTEXTS_OUT(F)    F(OBJECT, NULLABLE, context, msg_context_info)
#define LIST_REVOCATIONS_OUT(F) F(OBJECT, NULLABLE, revocation, msg_revocation_info)
#define PREFLIGHT_IN(F)                     \
	F(INT, REQUIRED, fileDescriptor, _) \
	F(ENUM, REQUIRED, access, access)
#define PREFLIGHT_OUT(F)                          \
	F(STRING, NULLABLE, fileSystem, _)        \
	F(BOOL, REQUIRED, leasable, _)            \
	F(STRING, NULLABLE, reason, _)            \
	F(BOOL, REQUIRED, dax, _)                 \
	F(OBJECT, NULLABLE, backing, msg_backing) \
	F(ENUM, REQUIRED, pinnable, pinnable)     \
	F(STRING, NULLABLE, pinReason, _)         \
	F(INT, REQUIRED, leaseBreakUSec, _)       \
	F(INT, REQUIRED, settleUSec, _)

enum method_kind { METHOD_CALL = false, METHOD_STREAM = true };

/* tag, name in the IDL, kind, fields in, fields out; the structs are msg_TAG_in and msg_TAG_out */
#define INTERFACE_METHODS(M)                                                          \
	M(hello, Hello, CALL, HELLO_IN, HELLO_OUT)                                    \
	M(resume, Resume, CALL, RESUME_IN, RESUME_OUT)                                \
	M(open_file, OpenFile, CALL, OPEN_FILE_IN, OPEN_FILE_OUT)                     \
	M(close_file, CloseFile, CALL, CLOSE_FILE_IN, NO_FIELDS)                      \
	M(add_context, AddContext, CALL, ADD_CONTEXT_IN, ADD_CONTEXT_OUT)             \
	M(remove_context, RemoveContext, CALL, REMOVE_CONTEXT_IN, NO_FIELDS)          \
	M(pin, Pin, CALL, PIN_IN, PIN_OUT)                                            \
	M(bind, Bind, CALL, BIND_IN, NO_FIELDS)                                       \
	M(unpin, Unpin, CALL, UNPIN_IN, UNPIN_OUT)                                    \
	M(extend, Extend, CALL, EXTEND_IN, EXTEND_OUT)                                \
	M(watch, Watch, STREAM, WATCH_IN, WATCH_OUT)                                  \
	M(list_pins, ListPins, STREAM, LIST_PINS_IN, LIST_PINS_OUT)                   \
	M(list_files, ListFiles, STREAM, NO_FIELDS, LIST_FILES_OUT)                   \
	M(list_clients, ListClients, STREAM, NO_FIELDS, LIST_CLIENTS_OUT)             \
	M(list_contexts, ListContexts, STREAM, LIST_CONTEXTS_IN, LIST_CONTEXTS_OUT)   \
	M(list_revocations, ListRevocations, STREAM, NO_FIELDS, LIST_REVOCATIONS_OUT) \
	M(preflight, Preflight, CALL, PREFLIGHT_IN, PREFLIGHT_OUT)

#define NOT_LEASABLE_FIELDS(F)             \
	F(STRING, REQUIRED, cause, _)      \
	F(STRING, NULLABLE, fileSystem, _) \
	F(STRING, REQUIRED, message, _)
#define BUSY_FIELDS(F)                 \
	F(STRING, REQUIRED, cause, _)  \
	F(INT, NULLABLE, untilUSec, _) \
	F(STRING, REQUIRED, message, _)
#define NOT_ALLOWED_FIELDS(F)         \
	F(STRING, REQUIRED, cause, _) \
	F(STRING, REQUIRED, message, _)
#define NO_SUCH_OBJECT_FIELDS(F)     \
	F(STRING, REQUIRED, type, _) \
	F(INT, REQUIRED, id, _)
#define LIMIT_EXCEEDED_FIELDS(F)      \
	F(STRING, REQUIRED, limit, _) \
	F(INT, REQUIRED, maximum, _)  \
	F(INT, REQUIRED, used, _)
#define REVOKED_FIELDS(F)               \
	F(INT, REQUIRED, revocation, _) \
	F(INTS, REQUIRED, pins, _)
#define RANGE_CONFLICT_FIELDS(F)        \
	F(INT, REQUIRED, revocation, _) \
	F(INT, REQUIRED, offset, _)     \
	F(INT, REQUIRED, length, _)
#define BEYOND_END_OF_FILE_FIELDS(F) \
	F(INT, REQUIRED, offset, _)  \
	F(INT, REQUIRED, length, _)  \
	F(INT, REQUIRED, size, _)
#define NOT_SUPPORTED_FIELDS(F)       \
	F(STRING, REQUIRED, cause, _) \
	F(STRING, REQUIRED, message, _)

/* tag, name in the IDL, fields */
#define INTERFACE_ERRORS(E)                                                   \
	E(msg_not_leasable, NotLeasable, NOT_LEASABLE_FIELDS)                 \
	E(msg_busy, Busy, BUSY_FIELDS)                                        \
	E(msg_not_allowed, NotAllowed, NOT_ALLOWED_FIELDS)                    \
	E(msg_no_such_object, NoSuchObject, NO_SUCH_OBJECT_FIELDS)            \
	E(msg_limit_exceeded, LimitExceeded, LIMIT_EXCEEDED_FIELDS)           \
	E(msg_revoked, Revoked, REVOKED_FIELDS)                               \
	E(msg_range_conflict, RangeConflict, RANGE_CONFLICT_FIELDS)           \
	E(msg_beyond_end_of_file, BeyondEndOfFile, BEYOND_END_OF_FILE_FIELDS) \
	E(msg_not_supported, NotSupported, NOT_SUPPORTED_FIELDS)

#define DECLARE_ENUMERATION(tag, ...)     extern const struct enumeration enumeration_##tag;
#define DECLARE_STRUCT(tag, name, FIELDS) SCHEMA_STRUCT(tag, FIELDS)
#define DECLARE_METHOD(tag, name, kind, IN, OUT) \
	SCHEMA_STRUCT(msg_##tag##_in, IN)        \
	SCHEMA_STRUCT(msg_##tag##_out, OUT)

INTERFACE_ENUMERATIONS(DECLARE_ENUMERATION)
INTERFACE_TYPES(DECLARE_STRUCT)
INTERFACE_METHODS(DECLARE_METHOD)
INTERFACE_ERRORS(DECLARE_STRUCT)

#undef DECLARE_ENUMERATION
#undef DECLARE_STRUCT
#undef DECLARE_METHOD

#define METHOD_INDEX(tag, name, kind, IN, OUT) METHOD_##name,
enum { INTERFACE_METHODS(METHOD_INDEX) METHOD_COUNT };
#undef METHOD_INDEX

#define INTERFACE_NAME "org.pinbroker"

/* Methods are in the order of the METHOD_ constants. */
extern const struct interface interface_pinbroker;
