package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// maxProgramBytes bounds a program; ours have up to a hundred MiB.
const maxProgramBytes = 512 << 20

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// A program is a static program of one architecture.
type program struct {
	name, arch string
	data       []byte
	info       *buildinfo.BuildInfo
}

// readProgram reads a program and refuses what would not run in an image that holds nothing else.
func readProgram(dir, name, arch string) (*program, error) {
	file := filepath.Join(dir, name+"_linux_"+arch)
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no file", file)
	case st.Size() > maxProgramBytes:
		return nil, fmt.Errorf("%s has %d bytes, more than %d", file, st.Size(), maxProgramBytes)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxProgramBytes+1))
	if err != nil {
		return nil, err
	}
	if err := checkELF(data, arch); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	info, err := buildinfo.Read(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: what it was built from is not in it: %w", file, err)
	}
	return &program{name: name, arch: arch, data: data, info: info}, nil
}

func checkELF(data []byte, arch string) error {
	e, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("not a program for linux: %w", err)
	}
	defer e.Close()
	if e.Machine != machines[arch] {
		return fmt.Errorf("a program for %v, not for %s", e.Machine, arch)
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("not static: the image has no loader and no libraries; build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// layerOf is the only layer of an image: the programs, the names of their user, and /tmp. It returns the layer and the digest
// of what is compressed in it.
func layerOf(programs []*program, at time.Time) (layer []byte, diffID string, err error) {
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, d := range []struct {
		name string
		mode int64
	}{{"etc/", 0o755}, {"etc/signet/", 0o755}, {"tmp/", 0o1777}, {"usr/", 0o755}, {"usr/bin/", 0o755}} {
		if err := w.WriteHeader(header(d.name, tar.TypeDir, d.mode, 0, at)); err != nil {
			return nil, "", err
		}
	}
	passwd := fmt.Sprintf("root:x:0:0:root:/:/nologin\nsignet:x:%s:%s:signet:/:/nologin\n", user, user)
	group := fmt.Sprintf("root:x:0:\nsignet:x:%s:\n", user)
	if err := errors.Join(writeFile(w, "etc/group", 0o644, []byte(group), at), writeFile(w, "etc/passwd", 0o644, []byte(passwd), at)); err != nil {
		return nil, "", err
	}
	for _, p := range programs {
		if err := writeFile(w, "usr/bin/"+p.name, 0o755, p.data, at); err != nil {
			return nil, "", err
		}
	}
	if err := w.Close(); err != nil {
		return nil, "", err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(plain.Bytes()); err != nil {
		return nil, "", err
	}
	if err := z.Close(); err != nil {
		return nil, "", err
	}
	return packed.Bytes(), "sha256:" + digest(plain.Bytes()), nil
}
