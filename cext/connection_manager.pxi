# SPDX-License-Identifier: Apache-2.0
# What pyverbs lacks of librdmacm: addresses given as sockaddr, wildcard addresses, event details.


cdef int check(int result, str call) except -1:
    if result != 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return 0


# Private data of a reject (InfiniBand specification, 12.6.7), and of a request in the TCP port
# space.
cdef enum:
    REJECT_DATA = 148
    REQUEST_DATA = 56


cdef sockaddr *sockaddr_of(bytes address) except NULL:
    """The struct sockaddr in ``address``, which must be as long as its family says."""
    cdef Py_ssize_t size = len(address)
    cdef sockaddr *raw = <sockaddr *> <char *> address
    if not (size == 16 and raw.sa_family == AF_INET
            or size == 28 and raw.sa_family == AF_INET6):
        raise ValueError(f"{size} bytes are no struct sockaddr_in or sockaddr_in6")
    return raw


def event_channel_fd(channel) -> int:
    """Return the channel's file descriptor, made non-blocking.

    Non-blocking, because rdma_get_cm_event() may find that an event which made the descriptor
    readable is one it handles by itself, and would then wait for the next one with the GIL held.
    """
    cdef rdma_event_channel *raw = channel_handle(channel)
    cdef int flags = fcntl(raw.fd, F_GETFL)
    if flags < 0 or fcntl(raw.fd, F_SETFL, flags | O_NONBLOCK) < 0:
        raise OSError(errno, f"fcntl: {strerror(errno).decode()}")
    return raw.fd


def async_fd(context) -> int:
    """Return the descriptor on which the device reports asynchronous events."""
    return context_handle(context).async_fd


def event_details(event) -> tuple:
    """Return (type, status, identifier, listening identifier) of a CMEvent.

    status is 0, a negative errno, or the reject reason of the IB specification's table 108; the
    identifiers are opaque numbers to compare with identifier().
    """
    cdef rdma_cm_event *raw = event_handle(event)
    return raw.event, raw.status, <size_t> raw.id, <size_t> raw.listen_id


def event_name(int event) -> str:
    return rdma_event_str(event).decode()


def identifier(cmid) -> int:
    return <size_t> id_handle(cmid)


def port_number(cmid) -> int:
    return id_handle(cmid).port_num


def bind_address(cmid, bytes address) -> None:
    """rdma_bind_addr() with REUSEADDR; address is a struct sockaddr, a wildcard one allowed."""
    cdef rdma_cm_id *raw = id_handle(cmid)
    cdef int one = 1
    check(rdma_set_option(raw, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &one, sizeof(one)),
          "rdma_set_option")
    check(rdma_bind_addr(raw, sockaddr_of(address)), "rdma_bind_addr")


def resolve_address(cmid, bytes source, bytes destination, int timeout_ms) -> None:
    """Begin rdma_resolve_addr(); the outcome arrives as an event. source may be None."""
    cdef rdma_cm_id *raw = id_handle(cmid)
    cdef sockaddr *src = NULL
    cdef sockaddr *dst = sockaddr_of(destination)
    if source is not None:
        src = sockaddr_of(source)
    cdef int result
    with nogil:
        result = rdma_resolve_addr(raw, src, dst, timeout_ms)
    check(result, "rdma_resolve_addr")


def connect(
    cmid, bytes private_data, *, uint32_t qp_number, uint8_t read_depth, uint8_t retry,
    uint8_t rnr_retry
) -> None:
    """rdma_connect(), without the GIL; the outcome arrives as an event.

    An iWARP provider connects over TCP within the call: it may take minutes.
    """
    cdef rdma_cm_id *raw = id_handle(cmid)
    cdef rdma_conn_param parameters
    cdef int result
    cdef int code = 0
    if len(private_data) > REQUEST_DATA:
        raise ValueError(f"a request carries up to {REQUEST_DATA} bytes, not {len(private_data)}")
    memset(&parameters, 0, sizeof(parameters))
    parameters.private_data = <const char *> private_data
    parameters.private_data_len = <uint8_t> len(private_data)
    parameters.responder_resources = read_depth
    parameters.initiator_depth = read_depth
    parameters.retry_count = retry
    parameters.rnr_retry_count = rnr_retry
    parameters.qp_num = qp_number
    with nogil:
        result = rdma_connect(raw, &parameters)
        if result != 0:
            code = errno
    if result != 0:
        raise OSError(code, f"rdma_connect: {strerror(code).decode()}")


def reject(cmid, bytes private_data) -> None:
    cdef const char *data = private_data
    if len(private_data) > REJECT_DATA:
        raise ValueError(f"a reject carries up to {REJECT_DATA} bytes, not {len(private_data)}")
    check(rdma_reject(id_handle(cmid), data, <uint8_t> len(private_data)), "rdma_reject")


cdef bytes sockaddr_bytes(sockaddr *address):
    if address == NULL:
        return b""
    if address.sa_family == AF_INET:
        return (<char *> address)[:16]
    if address.sa_family == AF_INET6:
        return (<char *> address)[:28]
    return b""


def local_address(cmid) -> bytes:
    """The identifier's own address as a struct sockaddr; empty where there is none."""
    return sockaddr_bytes(rdma_get_local_addr(id_handle(cmid)))


def peer_address(cmid) -> bytes:
    """The peer's address as a struct sockaddr; empty where there is none."""
    return sockaddr_bytes(rdma_get_peer_addr(id_handle(cmid)))


def device_name(cmid) -> str:
    """The device that the identifier is bound to; empty where it is bound to none yet."""
    cdef rdma_cm_id *raw = id_handle(cmid)
    if raw.verbs == NULL:
        return ""
    return ibv_get_device_name(raw.verbs.device).decode()


def source_gid(cmid) -> bytes:
    """The 16 bytes of the GID that stands for this end of the connection."""
    cdef rdma_cm_id *raw = id_handle(cmid)
    return (<char *> raw.source_gid.raw)[:16]


def path_attributes(cmid) -> tuple:
    """Return (GID index, path MTU in bytes) that the connection's queue pair is given.

    Known once the peer's request or reply has arrived. Each is None where the connection has no
    such thing: iWARP runs over TCP, and InfiniBand within one subnet needs no GID.
    """
    cdef ibv_qp_attr attributes
    cdef int mask = 0
    memset(&attributes, 0, sizeof(attributes))
    attributes.qp_state = IBV_QPS_RTR
    check(rdma_init_qp_attr(id_handle(cmid), &attributes, &mask), "rdma_init_qp_attr")
    index = attributes.sgid_index if mask & IBV_QP_AV and attributes.is_global else None
    # enum ibv_mtu: 1 is 256 bytes, and each further one doubles it.
    mtu = 128 << attributes.path_mtu if mask & IBV_QP_PATH_MTU else None
    return index, mtu


def max_message_size(context, uint8_t port) -> int:
    """Largest single message or write that the port takes, bytes."""
    cdef ibv_port_attr attributes
    cdef int result = ibv_query_port(context_handle(context), port, &attributes)
    if result != 0:
        raise OSError(result, f"ibv_query_port: {strerror(result).decode()}")
    return attributes.max_msg_sz


def move_queue_pair(cmid, qp, int state, int rnr_retry=-1) -> None:
    """Move a queue pair that rdma_cm does not own to INIT, RTR or RTS, as the connection asks.

    rnr_retry, when not negative, replaces what the peer asked for: a peer that asks for 0 would
    break the connection whenever it is late to post a receive; 7 waits for it.
    """
    cdef ibv_qp_attr attributes
    cdef int mask = 0
    memset(&attributes, 0, sizeof(attributes))
    attributes.qp_state = state
    check(rdma_init_qp_attr(id_handle(cmid), &attributes, &mask), "rdma_init_qp_attr")
    if state == IBV_QPS_RTS and rnr_retry >= 0:
        attributes.rnr_retry = <uint8_t> rnr_retry
    cdef int result = ibv_modify_qp(qp_handle(qp), &attributes, mask)
    if result != 0:
        raise OSError(result, f"ibv_modify_qp: {strerror(result).decode()}")


def fail_queue_pair(qp) -> None:
    """Move the queue pair to the error state: nothing is sent, written or received any more."""
    cdef ibv_qp_attr attributes
    memset(&attributes, 0, sizeof(attributes))
    attributes.qp_state = IBV_QPS_ERR
    cdef int result = ibv_modify_qp(qp_handle(qp), &attributes, IBV_QP_STATE)
    if result != 0:
        raise OSError(result, f"ibv_modify_qp: {strerror(result).decode()}")
