package tpm

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/test/keystores"
)

// A device is a character device, the far end of a pseudo-terminal in raw mode, on which a test answers: the nearest to
// /dev/tpmrm0 that there is without a TPM.
type device struct {
	path   string
	master *os.File
}

func newDevice(t *testing.T) *device {
	t.Helper()
	// Blocking, as its reads end when the test closes the other side of what it is connected to.
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var number uint32
	control := func(what string, f func(fd int) error) {
		raw, err := master.SyscallConn()
		if err == nil {
			if ctlErr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); ctlErr != nil {
				err = ctlErr
			}
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	control("unlocking the pseudo-terminal", func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0) })
	control("its number", func(fd int) (err error) { number, err = unix.IoctlGetUint32(fd, unix.TIOCGPTN); return err })
	control("raw mode", func(fd int) error {
		tio, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		tio.Iflag, tio.Oflag, tio.Lflag = 0, 0, 0
		tio.Cflag = tio.Cflag&^unix.CSIZE | unix.CS8
		tio.Cc[unix.VMIN], tio.Cc[unix.VTIME] = 1, 0
		return unix.IoctlSetTermios(fd, unix.TCSETS, tio)
	})
	d := &device{path: fmt.Sprintf("/dev/pts/%d", number), master: master}
	// One more holder keeps the terminal alive between the uses of it.
	keep, err := os.OpenFile(d.path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keep.Close() })
	return d
}

func TestCharacterDevice(t *testing.T) {
	sw := keystores.SWTPM(t)
	d := newDevice(t)
	s, err := net.Dial("unix", sw.Socket)
	if err != nil {
		t.Fatal(err)
	}
	var relays sync.WaitGroup
	relays.Go(func() { io.Copy(s, d.master) })
	relays.Go(func() { io.Copy(d.master, s) })
	e, p := begin(t, Attestor{Device: d.path, Dir: filepath.Join(t.TempDir(), "tpm")})
	if len(p.EK) == 0 || len(p.AK.Public) == 0 {
		t.Errorf("payload %+v", p)
	}
	if err := e.(*evidence).Close(); err != nil {
		t.Error(err)
	}
	d.master.Close()
	s.Close()
	relays.Wait()
}

func TestCharacterDeviceThatHangs(t *testing.T) {
	d := newDevice(t)
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		d.master.Read(make([]byte, 1000))
		cancel()
	}()
	if _, err := (Attestor{Device: d.path, Dir: filepath.Join(t.TempDir(), "tpm")}).Begin(ctx); err == nil {
		t.Error("it was taken for a TPM")
	}
	<-asked
	d.master.Close()
}
