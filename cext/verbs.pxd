# SPDX-License-Identifier: Apache-2.0
"""The part of libibverbs and librdmacm that the Cython layer calls itself."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "<infiniband/verbs.h>" nogil:
    enum: IBV_ACCESS_LOCAL_WRITE
    enum: IBV_ACCESS_REMOTE_WRITE
    enum: IBV_SEND_SIGNALED
    enum: IBV_WR_RDMA_READ
    enum: IBV_WR_RDMA_WRITE
    enum: IBV_WR_SEND
    enum: IBV_WC_SUCCESS
    enum: IBV_WC_WR_FLUSH_ERR
    enum: IBV_QPS_INIT
    enum: IBV_QPS_RTR
    enum: IBV_QPS_RTS
    enum: IBV_QPS_ERR
    enum: IBV_QP_STATE
    enum: IBV_QP_AV
    enum: IBV_QP_PATH_MTU

    union ibv_gid:
        uint8_t raw[16]

    struct ibv_device:
        pass

    struct ibv_context:
        ibv_device *device
        int cmd_fd
        int async_fd

    struct ibv_pd:
        ibv_context *context
        uint32_t handle

    struct ibv_mr:
        uint32_t lkey
        uint32_t rkey

    struct ibv_comp_channel:
        ibv_context *context
        int fd

    struct ibv_cq:
        ibv_context *context
        ibv_comp_channel *channel
        int cqe

    struct ibv_qp:
        ibv_context *context
        uint32_t qp_num

    struct ibv_qp_attr:
        int qp_state
        int path_mtu
        uint8_t is_global "ah_attr.is_global"
        uint8_t sgid_index "ah_attr.grh.sgid_index"
        uint8_t rnr_retry

    struct ibv_sge:
        uint64_t addr
        uint32_t length
        uint32_t lkey

    struct ibv_send_wr:
        uint64_t wr_id
        ibv_send_wr *next
        ibv_sge *sg_list
        int num_sge
        int opcode
        unsigned int send_flags
        # C names may be paths: the members of an anonymous struct in an anonymous union.
        uint64_t remote_addr "wr.rdma.remote_addr"
        uint32_t remote_key "wr.rdma.rkey"

    struct ibv_recv_wr:
        uint64_t wr_id
        ibv_recv_wr *next
        ibv_sge *sg_list
        int num_sge

    struct ibv_wc:
        uint64_t wr_id
        int status
        uint32_t vendor_err
        uint32_t byte_len

    struct ibv_port_attr:
        uint32_t max_msg_sz

    ibv_mr *ibv_reg_mr(ibv_pd *pd, void *addr, size_t length, int access)
    int ibv_dereg_mr(ibv_mr *mr)
    int ibv_post_send(ibv_qp *qp, ibv_send_wr *wr, ibv_send_wr **bad)
    int ibv_post_recv(ibv_qp *qp, ibv_recv_wr *wr, ibv_recv_wr **bad)
    int ibv_poll_cq(ibv_cq *cq, int entries, ibv_wc *wc)
    int ibv_req_notify_cq(ibv_cq *cq, int solicited_only)
    int ibv_get_cq_event(ibv_comp_channel *channel, ibv_cq **cq, void **context)
    void ibv_ack_cq_events(ibv_cq *cq, unsigned int events)
    int ibv_modify_qp(ibv_qp *qp, ibv_qp_attr *attr, int mask)
    const char *ibv_get_device_name(ibv_device *device)
    int ibv_query_port(ibv_context *context, uint8_t port, ibv_port_attr *attr)
    const char *ibv_wc_status_str(int status)


cdef extern from "<sys/socket.h>" nogil:
    struct sockaddr:
        unsigned short sa_family


cdef extern from "<rdma/rdma_cma.h>" nogil:
    enum: RDMA_PS_TCP
    enum: RDMA_OPTION_ID
    enum: RDMA_OPTION_ID_REUSEADDR

    struct rdma_event_channel:
        int fd

    struct rdma_cm_id:
        ibv_context *verbs
        rdma_event_channel *channel
        ibv_qp *qp
        int ps
        uint8_t port_num
        ibv_gid source_gid "route.addr.addr.ibaddr.sgid"

    struct rdma_cm_event:
        rdma_cm_id *id
        rdma_cm_id *listen_id
        int event
        int status

    struct rdma_conn_param:
        const void *private_data
        uint8_t private_data_len
        uint8_t responder_resources
        uint8_t initiator_depth
        uint8_t retry_count
        uint8_t rnr_retry_count
        uint32_t qp_num

    int rdma_connect(rdma_cm_id *id, rdma_conn_param *conn_param)
    int rdma_bind_addr(rdma_cm_id *id, sockaddr *addr)
    int rdma_resolve_addr(rdma_cm_id *id, sockaddr *src, sockaddr *dst, int timeout_ms)
    int rdma_reject(rdma_cm_id *id, const void *private_data, uint8_t length)
    int rdma_set_option(rdma_cm_id *id, int level, int name, void *value, size_t length)
    int rdma_init_qp_attr(rdma_cm_id *id, ibv_qp_attr *attr, int *mask)
    sockaddr *rdma_get_local_addr(rdma_cm_id *id)
    sockaddr *rdma_get_peer_addr(rdma_cm_id *id)
    const char *rdma_event_str(int event)
