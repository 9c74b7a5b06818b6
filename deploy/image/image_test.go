package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

// programs builds one of the examples for both architectures, and puts it where the three programs are looked for.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "signet-image-test-")
	if err != nil {
		return "", err
	}
	for arch := range machines {
		built := filepath.Join(dir, "built_"+arch)
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=", "-o", built, "../../examples/call")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("%w: %s", err, out)
		}
		for _, r := range recipes {
			for _, name := range append([]string{r.program}, r.more...) {
				if err := os.Link(built, filepath.Join(dir, name+"_linux_"+arch)); err != nil {
					return dir, err
				}
			}
		}
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, _ := programs(); dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

const commit = "0123456789abcdef0123456789abcdef01234567"

// pack makes the images in a folder of the test.
func pack(t *testing.T, more ...string) (out, said string) {
	t.Helper()
	from, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	out = filepath.Join(t.TempDir(), "images")
	var b bytes.Buffer
	args := append([]string{"-version", "1.2.3", "-commit", commit, "-time", "2026-01-02T05:04:05+02:00", "-prefix", "images.example.org/signet", "-out", out}, more...)
	if err := run(append(args, from), &b); err != nil {
		t.Fatal(err)
	}
	return out, b.String()
}

// A read layout is checked as whoever pulls it would: each blob against its digest and size.
type readLayout struct {
	t   *testing.T
	dir string
}

func (l readLayout) blob(d descriptor) []byte {
	l.t.Helper()
	sum, ok := strings.CutPrefix(d.Digest, "sha256:")
	if !ok || !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(sum) {
		l.t.Fatalf("digest %q", d.Digest)
	}
	data, err := os.ReadFile(filepath.Join(l.dir, "blobs", "sha256", sum))
	if err != nil {
		l.t.Fatal(err)
	}
	if digest(data) != sum || int64(len(data)) != d.Size {
		l.t.Errorf("blob %s: %d bytes with digest %s, descriptor says %d", sum, len(data), digest(data), d.Size)
	}
	return data
}

// strictly reads JSON that has no field which its type has not.
func strictly[T any](t *testing.T, data []byte) (v T) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%T: %v in %s", v, err, data)
	}
	return v
}

func (l readLayout) index() index {
	l.t.Helper()
	data, err := os.ReadFile(filepath.Join(l.dir, "index.json"))
	if err != nil {
		l.t.Fatal(err)
	}
	return strictly[index](l.t, data)
}

// An image holds its program, who runs it, and nothing else; each architecture has one, and an SBOM that refers to it.
func TestLayout(t *testing.T) {
	out, said := pack(t)
	from, _ := programs()
	for _, r := range recipes {
		l := readLayout{t, filepath.Join(out, r.name)}
		if v, err := os.ReadFile(filepath.Join(l.dir, "oci-layout")); err != nil || string(v) != `{"imageLayoutVersion":"1.0.0"}` {
			t.Errorf("oci-layout: %q, %v", v, err)
		}
		top := l.index().Manifests
		if len(top) != 3 || top[0].MediaType != typeIndex || top[0].Annotations["org.opencontainers.image.ref.name"] != "1.2.3" ||
			top[0].Annotations["io.containerd.image.name"] != "images.example.org/signet/"+r.name+":1.2.3" {
			t.Fatalf("%s: index.json names %+v", r.name, top)
		}
		if !strings.Contains(said, top[0].Digest+"  images.example.org/signet/"+r.name+":1.2.3\n") {
			t.Errorf("%q does not name %s", said, top[0].Digest)
		}
		images := strictly[index](t, l.blob(top[0])).Manifests
		if len(images) != 2 {
			t.Fatalf("%s: %d architectures", r.name, len(images))
		}
		for i, arch := range []string{"amd64", "arm64"} {
			if *images[i].Platform != (platform{arch, "linux"}) {
				t.Errorf("image %d is for %+v", i, images[i].Platform)
			}
			m := strictly[manifest](t, l.blob(images[i]))
			c := strictly[imageConfig](t, l.blob(m.Config))
			if c.Config.User != "65532:65532" || c.Architecture != arch || c.OS != "linux" || c.Config.Labels["org.opencontainers.image.revision"] != commit ||
				c.Created.Format("2006-01-02T15:04:05Z07:00") != "2026-01-02T03:04:05Z" || !slices.Equal(c.Config.Entrypoint, []string{"/usr/bin/" + r.program}) {
				t.Errorf("%s: configuration %+v", r.name, c)
			}
			want, err := os.ReadFile(filepath.Join(from, r.program+"_linux_"+arch))
			if err != nil {
				t.Fatal(err)
			}
			checkLayer(t, l.blob(m.Layers[0]), c.RootFS.DiffIDs, r, want)

			a := strictly[manifest](t, l.blob(top[1+i]))
			if a.Subject == nil || a.Subject.Digest != images[i].Digest || a.ArtifactType != typeSPDX || top[1+i].ArtifactType != typeSPDX || string(l.blob(a.Config)) != "{}" {
				t.Errorf("%s: what refers to %s: %+v", r.name, images[i].Digest, a)
			}
			beside, err := os.ReadFile(filepath.Join(out, r.name+"_linux_"+arch+".spdx.json"))
			if err != nil || !bytes.Equal(beside, l.blob(a.Layers[0])) {
				t.Errorf("the SBOM beside the layout is another one than in it: %v", err)
			}
			checkSBOM(t, beside, want, 1+len(r.more))
		}
	}
}

func checkLayer(t *testing.T, layer []byte, diffIDs []string, r recipe, want []byte) {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(io.LimitReader(z, maxProgramBytes))
	if err != nil {
		t.Fatal(err)
	}
	if len(diffIDs) != 1 || diffIDs[0] != "sha256:"+digest(plain) {
		t.Errorf("%s: diff ids %v, want one of %s", r.name, diffIDs, digest(plain))
	}
	var names []string
	files := tar.NewReader(bytes.NewReader(plain))
	for {
		h, err := files.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.ModTime.UTC().Format("2006-01-02T15:04:05") != "2026-01-02T03:04:05" {
			t.Errorf("%s: %+v tells of who made it", r.name, h)
		}
		names = append(names, fmt.Sprintf("%s %04o", h.Name, h.Mode))
		if h.Name == "usr/bin/"+r.program {
			if got, err := io.ReadAll(files); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: the program is another one: %v", r.name, err)
			}
		}
	}
	wanted := []string{"etc/ 0755", "etc/signet/ 0755", "tmp/ 1777", "usr/ 0755", "usr/bin/ 0755", "etc/group 0644", "etc/passwd 0644"}
	for _, name := range append([]string{r.program}, r.more...) {
		wanted = append(wanted, "usr/bin/"+name+" 0755")
	}
	if !slices.Equal(names, wanted) {
		t.Errorf("%s holds %q, want %q", r.name, names, wanted)
	}
}

// checkSBOM compares an SBOM with what the Go toolchain says of the program, and with what SPDX 2.3 demands of a document.
func checkSBOM(t *testing.T, sbom, program []byte, programs int) {
	t.Helper()
	doc := strictly[spdxDocument](t, sbom)
	if doc.SPDXVersion != "SPDX-2.3" || doc.DataLicense != "CC0-1.0" || doc.SPDXID != "SPDXRef-DOCUMENT" || doc.Name == "" || !strings.HasPrefix(doc.DocumentNamespace, "https://") ||
		doc.CreationInfo.Created != "2026-01-02T03:04:05Z" || len(doc.CreationInfo.Creators) != 1 || !strings.HasPrefix(doc.CreationInfo.Creators[0], "Tool: ") {
		t.Errorf("document %+v", doc)
	}
	ids := map[string]bool{doc.SPDXID: true}
	has := map[string]spdxPackage{}
	for _, p := range doc.Packages {
		if !regexp.MustCompile(`^SPDXRef-[A-Za-z0-9.-]+$`).MatchString(p.SPDXID) || ids[p.SPDXID] || p.Name == "" || p.DownloadLocation == "" || p.FilesAnalyzed {
			t.Errorf("package %+v", p)
		}
		ids[p.SPDXID] = true
		has[p.Name] = p
	}
	for _, r := range doc.Relationships {
		if !ids[r.Element] || !ids[r.Related] {
			t.Errorf("relationship %+v names what is not there", r)
		}
	}
	if len(doc.Relationships) != programs*(len(doc.Packages)-programs+1) || doc.Relationships[0] != (spdxRelation{"SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-program-1"}) {
		t.Errorf("%d relationships of %d packages, the first %+v", len(doc.Relationships), len(doc.Packages), doc.Relationships[0])
	}
	if c := doc.Packages[0].Checksums; len(c) != 1 || c[0] != (spdxChecksum{"SHA256", digest(program)}) {
		t.Errorf("checksums of the program: %+v", c)
	}
	info, err := buildinfo.Read(bytes.NewReader(program))
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Deps) < 5 || len(doc.Packages) != len(info.Deps)+1+programs {
		t.Errorf("%d packages for %d modules", len(doc.Packages), len(info.Deps))
	}
	for _, m := range info.Deps {
		if p := has[m.Path]; p.VersionInfo != m.Version || p.SourceInfo != "go.sum has "+m.Sum || p.ExternalRefs[0].Locator != "pkg:golang/"+m.Path+"@"+strings.ReplaceAll(m.Version, "+", "%2B") && !strings.Contains(m.Version, "+") {
			t.Errorf("%s %s %s is there as %+v", m.Path, m.Version, m.Sum, p)
		}
	}
}

// Two runs give the same bytes, wherever they are made and whatever was there before.
func TestSameBytes(t *testing.T) {
	first, _ := pack(t)
	second, _ := pack(t)
	from, _ := programs()
	if err := run([]string{"-version", "1.2.3", "-commit", commit, "-time", "2026-01-02T03:04:05Z", "-prefix", "images.example.org/signet", "-out", second, from}, io.Discard); err != nil {
		t.Fatal(err)
	}
	files := 0
	err := filepath.WalkDir(first, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files++
		rel, _ := filepath.Rel(first, path)
		a, errA := os.ReadFile(path)
		b, errB := os.ReadFile(filepath.Join(second, rel))
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs", rel)
		}
		return errors.Join(errA, errB)
	})
	if err != nil || files < len(recipes)*12 {
		t.Errorf("%d files compared, %v", files, err)
	}
}

// What would not run in an image that holds nothing else is refused, and so is what would make a bad name.
func TestRefusals(t *testing.T) {
	from, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(from, "signet_linux_amd64")
	write := func(data []byte) func(t *testing.T, file string) {
		return func(t *testing.T, file string) {
			if err := os.WriteFile(file, data, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, want string
		program    func(t *testing.T, file string) // puts it into its place; nil: a good one
		args       []string
	}{
		{name: "nothing there", want: "no such file", program: func(*testing.T, string) {}},
		{name: "a folder", want: "is no file", program: func(t *testing.T, file string) {
			if err := os.Mkdir(file, 0o755); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "empty", want: "not a program for linux", program: write(nil)},
		{name: "a script", want: "not a program for linux", program: write([]byte("#!/bin/sh\n"))},
		{name: "cut off in its head", want: "signet_linux_amd64", program: write(whole[:100])},
		{name: "cut off in its middle", want: "signet_linux_amd64", program: write(whole[:len(whole)/2])},
		{name: "needs a loader", want: "build it with CGO_ENABLED=0", program: func(t *testing.T, file string) {
			sh, err := os.ReadFile("/bin/sh")
			if err != nil {
				t.Fatal(err)
			}
			write(sh)(t, file)
		}},
		{name: "another architecture", want: "not for amd64", program: func(t *testing.T, file string) {
			if err := os.Link(filepath.Join(from, "signet_linux_arm64"), file); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "too large", want: "more than 536870912", program: func(t *testing.T, file string) {
			write(whole)(t, file)
			if err := os.Truncate(file, maxProgramBytes+1); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "version", want: `-version "a/b" cannot be a tag`, args: []string{"-version", "a/b"}},
		{name: "no version", want: "cannot be a tag", args: []string{"-version", ""}},
		{name: "long version", want: "cannot be a tag", args: []string{"-version", strings.Repeat("1", 129)}},
		{name: "time", want: `-time "yesterday"`, args: []string{"-time", "yesterday"}},
		{name: "prefix", want: `-prefix "/x"`, args: []string{"-prefix", "/x"}},
		{name: "architecture", want: `"riscv64" is not amd64 or arm64`, args: []string{"-arch", "amd64,riscv64"}},
		{name: "out", want: "-out is missing", args: []string{"-out", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, r := range recipes {
				for _, name := range append([]string{r.program}, r.more...) {
					file := filepath.Join(dir, name+"_linux_amd64")
					if name == "signet" && tt.program != nil {
						tt.program(t, file)
					} else if err := os.Link(good, file); err != nil {
						t.Fatal(err)
					}
				}
			}
			args := append([]string{"-version", "1", "-time", "2026-01-02T03:04:05Z", "-arch", "amd64", "-out", filepath.Join(dir, "out")}, tt.args...)
			if err := run(append(args, dir), io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q", err, tt.want)
			}
		})
	}
}
