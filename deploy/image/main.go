// Command image packs the programs of signet into container images, as OCI image layouts: without an engine, a base image or
// a registry, and the same bytes from the same programs. tools/image.sh calls it; the daemons never do.
//
//	image -version 1.2.3 -commit 0123… -time 2026-01-02T03:04:05Z -out dist/images DIR
//
// DIR holds static programs as tools/image.sh builds them: signet_linux_amd64, signet-agent_linux_arm64 and so on.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "image: error: %v\n", err)
		os.Exit(1)
	}
}

// user is whom the programs run as unless the pod says otherwise. It is not the overflow uid 65534, which is nobody's.
const user = "65532"

// A recipe says how one image is made.
type recipe struct {
	name, title, description string
	program                  string // its file in DIR without _linux_ARCH, and in the image below /usr/bin
	command                  []string
	more                     []string // other programs beside it
}

var recipes = []recipe{
	{name: "signet-ca", title: "signet CA", description: "The CA of a SPIFFE trust domain, with all commands for its operators",
		program: "signet", command: []string{"ca", "run", "--config", "/etc/signet/ca.yaml"}},
	{name: "signet-agent", title: "signet agent", description: "The SPIFFE Workload API of a node",
		program: "signet-agent", command: []string{"-config", "/etc/signet/agent.yaml"}},
	{name: "signet-proxy", title: "signet proxy", description: "Mutual TLS and call policies for programs that know neither",
		program: "signet-proxy", command: []string{"-config", "/etc/signet/proxy.yaml"}},
	{name: "signet-examples", title: "signet examples", description: "The service and the client of signet's documentation, to try an installation with",
		program: "documents-service", command: []string{"-listen", ":9443"}, more: []string{"call"}},
}

// A build is what all images of one run have in common.
type build struct {
	version, commit string
	time            time.Time
	prefix          string // of image names, without the last slash
	archs           []string
	from, out       string
}

func run(args []string, stdout io.Writer) error {
	var b build
	var at, archs string
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.StringVar(&b.version, "version", "", "`VERSION`, which becomes the images' tag")
	flags.StringVar(&b.commit, "commit", "", "`COMMIT` that the programs were built from")
	flags.StringVar(&at, "time", "", "the commit's `TIME`, RFC 3339, which everything in the images gets")
	flags.StringVar(&b.prefix, "prefix", "localhost", "what stands before the images' names, such as `HOST/PROJECT`")
	flags.StringVar(&archs, "arch", "amd64,arm64", "architectures, `A,B`")
	flags.StringVar(&b.out, "out", "", "`FOLDER` for the images; what is there of an earlier run is replaced")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("name one folder with the programs")
	}
	b.from, b.archs = flags.Arg(0), strings.Split(archs, ",")
	var err error
	if b.time, err = time.Parse(time.RFC3339, at); err != nil {
		return fmt.Errorf("-time %q: %w", at, err)
	}
	b.time = b.time.UTC()
	if err := b.check(); err != nil {
		return err
	}
	for _, r := range recipes {
		digest, err := b.image(r)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		fmt.Fprintf(stdout, "%s  %s\n", digest, b.reference(r))
	}
	return nil
}

func (b *build) check() error {
	if b.out == "" {
		return errors.New("-out is missing")
	}
	if !isTag(b.version) {
		return fmt.Errorf("-version %q cannot be a tag: letters, digits, _ . and - are, up to 128 of them, and it begins with none of . and -", b.version)
	}
	if b.prefix == "" || strings.ContainsAny(b.prefix, " @") || strings.HasPrefix(b.prefix, "/") || strings.HasSuffix(b.prefix, "/") {
		return fmt.Errorf("-prefix %q: give a host, with folders if there are any, such as images.example.org/signet", b.prefix)
	}
	for _, a := range b.archs {
		if _, ok := machines[a]; !ok {
			return fmt.Errorf("-arch: %q is not amd64 or arm64", a)
		}
	}
	return nil
}

func isTag(s string) bool {
	for _, r := range s {
		if r != '_' && r != '.' && r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') {
			return false
		}
	}
	return s != "" && len(s) <= 128 && s[0] != '.' && s[0] != '-'
}

// reference is the image's whole name.
func (b *build) reference(r recipe) string { return b.prefix + "/" + r.name + ":" + b.version }

// image writes OUT/NAME, an OCI layout, OUT/NAME.tar, the same as an archive that engines load, and for each architecture
// OUT/NAME_linux_ARCH.spdx.json. It returns the digest of the image's index.
func (b *build) image(r recipe) (string, error) {
	l, err := newLayout(filepath.Join(b.out, r.name))
	if err != nil {
		return "", err
	}
	index := index{SchemaVersion: 2, MediaType: typeIndex, Annotations: b.labels(r)}
	var attached []descriptor
	for _, arch := range b.archs {
		var programs []*program
		for _, name := range append([]string{r.program}, r.more...) {
			p, err := readProgram(b.from, name, arch)
			if err != nil {
				return "", err
			}
			programs = append(programs, p)
		}
		manifest, err := b.manifest(l, r, programs)
		if err != nil {
			return "", err
		}
		index.Manifests = append(index.Manifests, manifest)
		sbom, err := b.sbom(r, programs)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(b.out, r.name+"_linux_"+arch+".spdx.json"), sbom, 0o644); err != nil {
			return "", err
		}
		referrer, err := b.attach(l, manifest, sbom)
		if err != nil {
			return "", err
		}
		attached = append(attached, referrer)
	}
	top, err := l.addJSON(typeIndex, index)
	if err != nil {
		return "", err
	}
	top.Annotations = map[string]string{
		"org.opencontainers.image.ref.name": b.version,
		"io.containerd.image.name":          b.reference(r),
	}
	if err := l.archive(filepath.Join(b.out, r.name+".tar"), top, b.time); err != nil {
		return "", err
	}
	return top.Digest, l.finish(append([]descriptor{top}, attached...))
}

// manifest adds the image for one architecture.
func (b *build) manifest(l *layout, r recipe, programs []*program) (descriptor, error) {
	arch := programs[0].arch
	layer, diffID, err := layerOf(programs, b.time)
	if err != nil {
		return descriptor{}, err
	}
	layerAt, err := l.add(typeLayer, layer)
	if err != nil {
		return descriptor{}, err
	}
	labels := b.labels(r)
	config, err := l.addJSON(typeConfig, imageConfig{
		Created: b.time, Architecture: arch, OS: "linux",
		Config: runConfig{
			User: user + ":" + user, WorkingDir: "/", Env: []string{"PATH=/usr/bin"}, Labels: labels,
			Entrypoint: []string{"/usr/bin/" + r.program}, Cmd: r.command,
		},
		RootFS:  rootFS{Type: "layers", DiffIDs: []string{diffID}},
		History: []history{{Created: b.time, CreatedBy: "signet deploy/image"}},
	})
	if err != nil {
		return descriptor{}, err
	}
	d, err := l.addJSON(typeManifest, manifest{SchemaVersion: 2, MediaType: typeManifest, Config: config, Layers: []descriptor{layerAt}, Annotations: labels})
	d.Platform = &platform{Architecture: arch, OS: "linux"}
	return d, err
}

// attach adds the SBOM as what refers to an image, so that tools which copy the layout to a registry bring it along.
func (b *build) attach(l *layout, to descriptor, sbom []byte) (descriptor, error) {
	empty, err := l.add(typeEmpty, []byte("{}"))
	if err != nil {
		return descriptor{}, err
	}
	text, err := l.add(typeSPDX, sbom)
	if err != nil {
		return descriptor{}, err
	}
	subject := descriptor{MediaType: to.MediaType, Digest: to.Digest, Size: to.Size}
	about := map[string]string{"org.opencontainers.image.created": b.time.Format(time.RFC3339)}
	d, err := l.addJSON(typeManifest, manifest{SchemaVersion: 2, MediaType: typeManifest, ArtifactType: typeSPDX, Config: empty, Layers: []descriptor{text}, Subject: &subject, Annotations: about})
	d.ArtifactType, d.Annotations = typeSPDX, about
	return d, err
}

func (b *build) labels(r recipe) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       r.title,
		"org.opencontainers.image.description": r.description,
		"org.opencontainers.image.version":     b.version,
		"org.opencontainers.image.revision":    b.commit,
		"org.opencontainers.image.created":     b.time.Format(time.RFC3339),
		"org.opencontainers.image.source":      "https://github.com/signet-id/signet",
		"org.opencontainers.image.licenses":    license,
	}
}
