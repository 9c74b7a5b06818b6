package examiner

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/signet-id/signet/workloadapi/peer"
)

// What may be asked.
const (
	askStat byte = iota + 1
	askPath
	askOpen
	askPin
)

// maxPath is how long the kernel lets a path be.
const maxPath = unix.PathMax

const (
	requestBytes = 4 + 1 + 4
	answerBytes  = 4 + 4 + 6*8 // before the path
)

// A request asks one thing about one process.
type request struct {
	id  uint32 // which answer is to it
	ask byte
	pid int32
}

func (r request) marshal() []byte {
	b := make([]byte, 0, requestBytes)
	b = binary.BigEndian.AppendUint32(b, r.id)
	b = append(b, r.ask)
	return binary.BigEndian.AppendUint32(b, uint32(r.pid))
}

func parseRequest(b []byte) (request, error) {
	if len(b) != requestBytes {
		return request{}, fmt.Errorf("a request of %d bytes, not %d", len(b), requestBytes)
	}
	r := request{id: binary.BigEndian.Uint32(b), ask: b[4], pid: int32(binary.BigEndian.Uint32(b[5:]))}
	if r.ask < askStat || r.ask > askPin {
		return request{}, fmt.Errorf("a request of kind %d, which there is none", r.ask)
	}
	if r.pid <= 0 {
		return request{}, fmt.Errorf("process id %d is not positive", r.pid)
	}
	return r, nil
}

// An answer is what came of it. A descriptor comes beside it.
type answer struct {
	id    uint32
	errno unix.Errno // 0: it worked
	exe   peer.Executable
	path  string
}

func (a answer) marshal() []byte {
	b := make([]byte, 0, answerBytes+len(a.path))
	b = binary.BigEndian.AppendUint32(b, a.id)
	b = binary.BigEndian.AppendUint32(b, uint32(a.errno))
	for _, n := range []uint64{a.exe.Device, a.exe.Inode, uint64(a.exe.Size), uint64(a.exe.Modified), uint64(a.exe.Changed), a.exe.Links} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return append(b, a.path...)
}

func parseAnswer(b []byte) (answer, error) {
	if len(b) < answerBytes || len(b) > answerBytes+maxPath {
		return answer{}, fmt.Errorf("an answer of %d bytes", len(b))
	}
	n := func(i int) uint64 { return binary.BigEndian.Uint64(b[8+8*i:]) }
	a := answer{
		id: binary.BigEndian.Uint32(b), errno: unix.Errno(binary.BigEndian.Uint32(b[4:])),
		exe:  peer.Executable{File: peer.File{Device: n(0), Inode: n(1), Size: int64(n(2)), Modified: int64(n(3)), Changed: int64(n(4))}, Links: n(5)},
		path: string(b[answerBytes:]),
	}
	const maxErrno = 4095
	if a.errno > maxErrno {
		return answer{}, fmt.Errorf("an answer with error number %d", uint32(a.errno))
	}
	return a, nil
}

// errnoOf is the kernel's number in an error, or EIO.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno) && errno != 0:
		return errno
	}
	return unix.EIO
}
