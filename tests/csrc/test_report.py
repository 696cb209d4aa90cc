"""csrc/report.py on a report and a listing as CUDA's tools print them."""

from csrc.report import Kernel, divisions, read_code, read_report

REPORT = """\
ptxas info    : Compiling entry function '_Zfast' for 'sm_90a'
ptxas info    : Function properties for _Zfast
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compiling entry function '_Zlarge' for 'sm_90a'
ptxas info    : Function properties for _Zlarge
    16 bytes stack frame, 24 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
LISTING = """\
\t\tFunction : _Zfast
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
        /*0010*/                   MUFU.RCP R3, R2 ;                     /* 0x0000000000000000 */
        /*0020*/                   FFMA R4, R3, R3, R4 ;
        /*0030*/                   FADD R4, R4, R3 ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0050*/                   MUFU.RCP R5, R4 ;
        /*0060*/               @P1 BRA 0x90 ;
        /*0070*/              @!P0 BRA.U `(.L_1) ;
        /*0080*/              @!P2 BRA P1, 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
\t\tFunction : _Zlarge
        /*0000*/                   EXIT ;
"""


def test_registers_and_spills_by_kernel():
    kernels = read_report(REPORT)
    assert [(k.name, k.registers, k.spilled) for k in kernels.values()] == [("_Zfast", 40, 0), ("_Zlarge", 255, 24)]
    assert read_report(REPORT.replace("sm_90a", "sm_80")) == {}


def test_the_longest_loop_and_its_divisions():
    code = read_code(LISTING)
    fast = Kernel("_Zfast", 40, 0, code["_Zfast"])
    assert len(fast.code) == 11
    assert [i.address for i in fast.loop] == list(range(0x20, 0x90, 0x10))
    assert divisions(fast.code) == 2
    assert divisions(fast.loop) == 1
    assert Kernel("_Zlarge", 255, 24, code["_Zlarge"]).loop == ()
