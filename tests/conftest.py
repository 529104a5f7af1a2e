# SPDX-License-Identifier: Apache-2.0
"""Which of the tests on a device are part of every run.

All of them together take minutes on a device and an hour where the processor is emulated. `make
test` shall take fifteen minutes there, so it runs the ones listed here: each thing that the project
claims, once. `make test-full` runs all.
"""

from __future__ import annotations

import pytest

# The beginning of a node id below tests/: a file, a test, or one of its cells.
IN_EVERY_RUN = (
    "interop/test_return_path.py::test_guest_goes_out_and_comes_back[pin-all]",
    # Each two values of mode, machine and kind together (interop/test_matrix.py).
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[pin-all-pc-paused-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[pin-all-pc-dirtying-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[pin-all-q35-idle-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[pin-all-numa-paused-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[dynamic-pc-idle-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[dynamic-q35-paused-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[dynamic-q35-dirtying-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[dynamic-numa-idle-",
    "interop/test_round_trip.py::test_guest_goes_out_and_comes_back[dynamic-numa-dirtying-",
    "docker/test_docker_entrypoint.py",
    "interop/test_proof.py::test_destination_that_lacks_the_last_device_is_no_success[snapshot]",
    "interop/test_driving.py::test_guest_goes_through_a_checkpoint_into_another_qemu[pin-all]",
    "interop/test_used_memory.py::test_memory_that_was_used_is_what_the_source_had[dynamic-half]",
    "interop/test_faults_incoming.py::test_migration_cancelled_at_the_source",
    "interop/test_faults_incoming.py::test_disk_that_is_full_leaves_the_guest_to_its_source",
    "interop/test_commands.py::test_signal_in_mid_transfer_leaves_the_guest_to_its_source[15]",
    "interop/test_commit_point.py::test_killed_just_before_it_the_guest_runs_again_by_itself[after]",
    "interop/test_commit_point.py::test_killed_when_the_source_has_let_go[after]",
    "manager/test_restore.py::test_recorded_command_of_somebody_else_is_not_run",
    "packaging/test_plugin.py::test_running_machine_moves_by_another_engine",
    "packaging/test_plugin.py::test_guest_becomes_a_snapshot_and_runs_again[rdma-dynamic-process]",
    "rdma/test_rdma_cancel.py::test_refused_client_has_no_queue_pair_here",
    "rdma/test_rdma_cancel.py::test_trace_of_a_whole_migration[dynamic]",
    "rdma/test_rdma_connections.py::test_ram_goes_over_all_of_them[3-dynamic-return-path]",
    "rdma/test_rdma_fresh.py::test_what_a_snapshot_has_not_is_not_looked_at[pin-all]",
    "rdma/test_rdma_metrics.py::test_figures_are_those_of_the_event[dynamic]",
    "interop/test_trace_rules.py::test_both_ways_keep_the_rules[dynamic]",
    "rdma/test_rdma_accounting.py::test_what_a_snapshot_has_sent_is_told[dynamic]",
    "rdma/test_rdma_addresses.py::test_whole_migration_over_ipv6",
    "rdma/test_rdma_bench.py::test_what_is_measured_and_what_follows",
    "rdma/test_rdma_bad_destination.py::test_two_readys_in_a_row",
    "rdma/test_rdma_bad_destination.py::test_blocks_that_differ",
    "rdma/test_rdma_bad_destination.py::test_cancel_from_another_thread_ends_every_wait[connected]",
    "rdma/test_rdma_bad_source.py::test_other_version_is_rejected_with_a_reason_and_waiting_goes_on[2]",
    "rdma/test_rdma_bad_source.py::test_second_client_is_rejected_while_one_is_served",
    "rdma/test_rdma_bad_source.py::test_source_that_disconnects_at_any_step[RAM handed over]",
    "rdma/test_rdma_return_path.py::test_last_word_comes_when_the_snapshot_is_on_disk",
    "rdma/test_rdma_return_path.py::test_source_that_leaves_before_the_last_word_keeps_its_guest"
    "[device state sent]",
    "rdma/test_rdma_return_path.py::test_second_connection_from_elsewhere_is_rejected",
    "rdma/test_rdma_return_path.py::test_source_opens_the_return_path_first_and_believes_what_it_hears",
    "rdma/test_rdma_bad_source.py::test_write_after_the_keys_were_withdrawn_fails",
    "rdma/test_rdma_choice.py::test_source_takes_the_device_that_it_is_told_to",
    "rdma/test_rdma_choice.py::test_request_over_another_device_is_turned_away[0.0.0.0]",
    "rdma/test_rdma_doctor.py::test_both_hosts_and_the_path_between_them",
    "rdma/test_rdma_dynamic.py::test_unregistered_key_is_dead_and_a_new_one_lives",
    "rdma/test_rdma_dynamic.py::test_refused_pin_all_falls_back_to_chunk_by_chunk_and_completes",
    "rdma/test_rdma_guard.py::test_handle_that_points_nowhere",
    "rdma/test_rdma_hook_writes.py::test_each_border_ends_a_run_once[dynamic]",
    "rdma/test_rdma_hook_writes.py::test_no_write_has_to_complete_before_the_end_of_the_phase[pin-all]",
    "rdma/test_rdma_operating.py",
    "rdma/test_rdma_hooks.py::test_when_pages_are_merged_and_when_they_are_written",
    "rdma/test_rdma_hooks.py::test_page_by_page_and_in_bulk_the_same_bytes_arrive[pin-all]",
    "rdma/test_rdma_huge_pages.py::test_ram_arrives_in_huge_pages",
    "rdma/test_rdma_host_cannot.py::test_device_files_that_may_not_be_opened[both]",
    "rdma/test_rdma_host_cannot.py::test_port_that_is_taken",
    "rdma/test_rdma_host_cannot.py::test_name_that_does_not_resolve[no-such-host.invalid]",
    "rdma/test_rdma_host_cannot.py::test_memory_that_may_not_be_locked[5-RAM block pc.ram]",
    "rdma/test_rdma_host_cannot.py::test_no_device",
    "rdma/test_rdma_host_cannot.py::test_whole_migration_as_an_unprivileged_user_within_its_limit"
    "[pin-all]",
    "rdma/test_rdma_live.py::test_guest_goes_to_another_process[pin-all-64]",
    "rdma/test_rdma_live.py::test_guest_goes_to_another_process[dynamic-64]",
    "rdma/test_rdma_live.py::test_writer_faster_than_the_link_ends_by_the_time_limit_and_says_so"
    "[dynamic]",
    "rdma/test_rdma_lost_peer.py::test_killed_source_is_noticed[in the last phase]",
    "rdma/test_rdma_stream.py::test_messages_of_any_size[524272]",
    "rdma/test_rdma_stream.py::test_messages_that_end_at_fields_or_within_them[1]",
    "rdma/test_rdma_stream.py::test_shared_block_stays_where_it_is",
    "rdma/test_rdma_stream.py::test_other_live_sections_are_refused_by_name[between rounds]",
    "rdma/test_rdma_signals.py::test_incoming[in the last phase-15]",
    "rdma/test_rdma_signals.py::test_outgoing[all received-2]",
    "rdma/test_rdma_siw.py::test_signal_while_tcp_connects[15]",
    "rdma/test_rdma_siw.py::test_whole_migration[pin-all-1]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `full` what needs a device and is not listed; a line must fit something."""
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    files = {name.partition("::")[0] for name in names.values()}
    for item, name in names.items():
        on_device = any(item.get_closest_marker(mark) for mark in ("rdma", "qemu"))
        if on_device and not name.startswith(IN_EVERY_RUN):
            item.add_marker(pytest.mark.full)
    if any("::" in argument for item in items[:1] for argument in item.config.args):
        return  # single tests were asked for: most lines fit none of them
    for line in IN_EVERY_RUN:
        if line.partition("::")[0] in files and not any(
            name.startswith(line) for name in names.values()
        ):
            raise pytest.UsageError(f"tests/conftest.py: no test begins with {line}")
