/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef PINBROKER_VERBS_H
#define PINBROKER_VERBS_H

#include <infiniband/verbs.h>
#include <pinbroker.h>

#ifdef __cplusplus
extern "C" {
#endif

/*
 * libpinbroker-verbs: RDMA memory regions over files, registered with libibverbs and announced to
 * the broker. What pinbroker.h says of errors, threads, fork() and units holds here too.
 *
 *     pinbroker_new, pinbroker_set_revoke_callback, pinbroker_connect, pinbroker_open_file
 *     mmap of pinbroker_file_get_fd(), ibv_open_device, ibv_alloc_pd
 *     per region: pinbroker_reg_mr in place of ibv_reg_mr
 *     in the callback, for each of notice->pins: pinbroker_find_mr; see that no work that uses the
 *     region is under way, and pinbroker_dereg_mr
 *     ibv_dealloc_pd, pinbroker_close_device in place of ibv_close_device
 *
 * The device context (ibv_pd::context) is handed over to the broker by the first registration with
 * it, and taken back by pinbroker_close_device(). In between the broker's copy of its descriptor
 * keeps it, and the library keeps a reference to the pinbroker handle. Do not use
 * ibv_close_device() on it.
 *
 * Errors. Functions that return a pointer return NULL with errno set; those that return an int
 * return a negative errno, unlike those of libibverbs. What the broker refused is in
 * pinbroker_last_error() too; what the device refused is in errno alone.
 *
 * Handles. The kernel gives the handle of a region that is gone to the next one of that device
 * context. A region that the broker destroyed by force must therefore never be passed to
 * ibv_dereg_mr(), which would destroy somebody else's: always use pinbroker_dereg_mr() for what
 * pinbroker_reg_mr() has returned, and never ibv_rereg_mr() or pinbroker_unpin(). It keeps this
 * library's other registrations off while it deregisters. Somebody who registers with the same
 * device context past this library should not do so while regions are being revoked.
 */

/*
 * Pins [offset, offset + length) of the file, registers the memory at addr, and tells the broker
 * the handle. addr must be where that range of the file is mapped: nobody checks it. access: as for
 * ibv_reg_mr(); the file must have been opened for PINBROKER_WRITE if it has
 * IBV_ACCESS_LOCAL_WRITE, _REMOTE_WRITE, _REMOTE_ATOMIC or _MW_BIND. Can take as long as
 * ibv_reg_mr() does. The caller owns the region and lets it go with pinbroker_dereg_mr(). Fails as
 * pinbroker_add_context(), pinbroker_pin() and ibv_reg_mr() do, leaving nothing behind, and also
 * with
 *
 *     ESTALE      a revocation came before the region was ready: it is gone again. Try again when
 *                 the revocation has ended; but if that was PINBROKER_CAUSE_DEVICE close the
 *                 device, and open it anew if it is still there.
 *
 * With IBV_ACCESS_ON_DEMAND the pin is one of pinbroker_pin_on_demand(): the callback is told, but
 * nobody waits for the region, which may be kept, and gives remote access errors where the file has
 * ended.
 */
struct ibv_mr *pinbroker_reg_mr(pinbroker *pb, const pinbroker_file *file, uint64_t offset,
	struct ibv_pd *pd, void *addr, size_t length, int access);

/*
 * Lets the region go, and frees it. The pin is let go of first and then deregistered; the other way
 * round if the device's proof is not PINBROKER_PROOF_PROVABLE, as told at pinbroker_unpin(). Waits
 * for registrations with the same device that are under way in other threads.
 *
 * A region that the broker has destroyed by force, or that went with its device, is not
 * deregistered again, which is no failure: the result is 0. Its struct ibv_mr, some 50 to 150
 * bytes, is freed by ibv_unimport_mr() where the device's provider has that (mlx5), and otherwise
 * lost until the process ends, because libibverbs has no other way to free it alone. After
 * ibv_fork_init() its memory remains MADV_DONTFORK.
 *
 * Where the broker cannot say whether it has destroyed the region (-ENOTRECOVERABLE: it was
 * restarted without its state) the kernel is asked, and the result is 0 all the same.
 *
 * On failure the region is as before, and the call may be made again:
 *
 *     -ENOENT     mr is no region of this handle (any more): another thread was faster
 *     -ECONNRESET, -ENOMEM …  the broker could not be told
 *     what ibv_dereg_mr() returned, negative: mostly -EINVAL or -EBUSY, a memory window is bound to
 *                 it. The broker goes on waiting for the region to go.
 */
int pinbroker_dereg_mr(pinbroker *pb, struct ibv_mr *mr);

/*
 * The region of a pin, for a callback that is to let go of notice->pins. It is valid until somebody
 * deregisters it. NULL, with errno:
 *
 *     ENOENT       the pin is no region of this handle, or not any more
 *     EINPROGRESS  another thread is registering it, and its pinbroker_reg_mr() will now let go of
 *                  it and fail with ESTALE, or is deregistering it. There is nothing left to do.
 */
struct ibv_mr *pinbroker_find_mr(pinbroker *pb, uint64_t pin);

/*
 * Takes the device context back from the broker and closes it, as ibv_close_device() does, which is
 * all that is done for one that no region was registered with. Everything that was made from it has
 * to be freed before. On failure it is as before: -EBUSY while regions of this library are on it,
 * or another pinbroker handle has it.
 */
int pinbroker_close_device(pinbroker *pb, struct ibv_context *context);

#ifdef __cplusplus
}
#endif

#endif
