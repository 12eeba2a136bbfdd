"""A chat driven as a person does: through a pseudo-terminal whose screen is looked at."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import pyte
import pytest
from PIL import Image

from qwencli.commands import terminal_pictures
from qwencli.commands.chat_terminal import _ChatCompleter
from qwencli.commands.terminal_pictures import Graphics, render_picture

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
EXAMPLE = Path(__file__).parents[2] / "examples" / "four_objects.png"


class _Screen(pyte.HistoryScreen):
    """Answers what a program asks its terminal."""

    answers = b""

    def write_process_input(self, data):
        self.answers += data.encode()


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, arguments, columns=80, rows=24, **environment):
        import fcntl
        import pty
        import termios

        self._resized = lambda columns, rows: fcntl.ioctl(
            self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0)
        )
        self.screen = _Screen(columns, rows, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.child, self.file = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm-256color", **environment)
            for name in ("NO_COLOR", "TERM_PROGRAM", "LC_TERMINAL"):
                os.environ.pop(name, None)
            # A terminal has its size before a program starts.
            time.sleep(0.05)
            os.execv(sys.executable, [sys.executable, *arguments])
        self.resize(columns, rows)

    def resize(self, columns, rows):
        self._resized(columns, rows)
        self.screen.resize(rows, columns)

    def press(self, keys):
        os.write(self.file, keys if isinstance(keys, bytes) else keys.encode())

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, *wanted, gone="", within_s=90):
        """Run until the screen shows all of `wanted` and nothing of `gone`."""
        end = time.monotonic() + within_s
        while not all(text in self.text for text in wanted) or (gone and gone in self.text):
            assert time.monotonic() < end, f"no {wanted} on\n{self.text}"
            self._take(0.05)
        return self.text

    def at_prompt(self, wanted):
        """Run until `wanted` is there and below it an empty prompt with its toolbar: a Ctrl-C is
        then a key for the prompt, and no signal to what ran before it."""
        self.until(wanted)
        end = time.monotonic() + 90
        while not re.search(r"\n>\s*\n\s*\S", self.text[self.text.rfind(wanted) :]):
            assert time.monotonic() < end, f"no prompt on\n{self.text}"
            self._take(0.05)

    def rest(self):
        """Run until the program ends; returns its exit code."""
        end = time.monotonic() + 60
        while self._take(0.1):
            assert time.monotonic() < end, self.text
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def kill(self):
        try:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.file)

    def _take(self, seconds):
        if not select.select([self.file], [], [], seconds)[0]:
            return True
        try:
            read = os.read(self.file, 65536)
        except OSError:
            return False
        self.written += read
        self.stream.feed(read)
        if self.screen.answers:
            self.press(self.screen.answers)
            self.screen.answers = b""
        return bool(read)


# While the file is there an answer takes long enough to be seen and stopped, on any machine.
SLOW_ON_DEMAND = """
import time
from qwencli.cli import main
from qwencli.engine.frontend.detokenizer import IncrementalDetokenizer as Pieces

push = Pieces.push
Pieces.push = lambda text, ids: (time.sleep(0.1 * os.path.exists("slow")), push(text, ids))[1]
main()
"""


def test_a_conversation_at_a_terminal(tmp_path):
    """One process for all of it: to load the model takes longer than all that is looked at."""
    shutil.copy(EXAMPLE, tmp_path / "my picture.png")
    code = f"import os; os.chdir({str(tmp_path)!r})\n{SLOW_ON_DEMAND}"
    settings = ["--model", "scenes", "--device", "cpu", "--greedy", "--max-new-tokens", "60"]
    terminal = Terminal(["-c", code, "chat", *settings], XDG_DATA_HOME=str(tmp_path / "data"))
    try:
        terminal.until("type a message", "\n>", "scenes")
        _completion_and_pictures(terminal)
        _an_answer(terminal)
        _several_lines(terminal)
        _turns_again(terminal, tmp_path)
        _narrow(terminal)
        terminal.at_prompt("background.")
        terminal.press(b"\x04")
        assert terminal.rest() == 0
    finally:
        terminal.kill()
    # What was saved, what was kept, and what was typed.
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0]["files"][0]["path"] == str(tmp_path / "my picture.png")
    [kept] = (tmp_path / "data" / "qwencli" / "chats").glob("*.json")
    assert "chat --resume goes on" in terminal.text
    assert json.loads(kept.read_text())["messages"]
    assert "+/retry" in (tmp_path / "data" / "qwencli" / "chat_history").read_text()
    assert b"\x1b[2J" not in terminal.written, "nothing cleared the screen"


def _completion_and_pictures(terminal):
    terminal.press("/im")
    terminal.until("/image PATH...", "attach pictures")
    terminal.press("\t /nothing")
    terminal.press(b"\x03")  # drops it
    terminal.until(gone="/nothing")
    terminal.press("/image my")
    terminal.until(" my picture.png")
    terminal.press("\t")
    terminal.until("/image my\\ picture.png")
    terminal.press("\r")  # takes the completion
    terminal.press("\r")
    terminal.until("▀▀▀▀▀▀▀▀", "attached: my picture.png", "1 picture attached")


def _an_answer(terminal):
    terminal.press("What is the colour of the star?\r")
    terminal.until("The star is yellow.", "tok/s", "TTFT", "context", "of 16,384", "%")
    assert "attached ·" not in terminal.text


def _several_lines(terminal):
    terminal.press("one\\\rtwo\x1b\rthree\nfour")
    terminal.until("> one", "  two", "  three", "  four")
    terminal.press(b"\x1b[200~five\rsix\x1b[201~")
    terminal.until("  fourfive", "  six")
    terminal.press(b"\x03")
    terminal.until(gone="fourfive")
    # A dropped file becomes a mention; a paste that is not marked is one message.
    terminal.press(b"\x1b[200~" + str(EXAMPLE).encode() + b"\x1b[201~")
    terminal.until("> @/")
    terminal.press(b"\x03")
    terminal.until(gone="> @/")
    terminal.press("Describe\rthis image.\r")
    terminal.until("  this image.\n")
    terminal.until("tok/s", gone="reading")


def _turns_again(terminal, folder):
    terminal.press("/undo\r")
    terminal.until("forgotten: Describe")
    terminal.press("/set temperature=0.2\r")
    terminal.until("temperature=0.2, top_p=default")
    terminal.press("/retry\r")
    terminal.until("> /retry")
    terminal.until("tok/s", gone="reading")
    terminal.press("/edit\r")
    terminal.until("1 picture attached")
    terminal.press(" Now.")
    terminal.until("> What is the colour of the star? Now.")
    terminal.press("\r")
    terminal.until("tok/s", gone="1 picture attached")
    terminal.press("/save talk.json\r")
    terminal.until("saved: talk.json")
    terminal.press("/clear\r")
    terminal.until("cleared")
    terminal.press("/load talk.json\r")
    terminal.until("1 turn from talk.json", "last asked: What is the colour of the star? Now.")
    # Ctrl-C stops an answer; what came is kept.
    terminal.press("/set max_new_tokens=5000\r/set temperature=2\r")
    terminal.until("max_new_tokens=5000", "temperature=2,")
    (folder / "slow").touch()
    terminal.press("Write much.\r")
    terminal.until(" tokens · ")
    terminal.press(b"\x03")
    terminal.until("stopped; what came is kept")
    (folder / "slow").unlink()
    terminal.press("/undo\r")
    terminal.at_prompt("forgotten: Write much.")
    terminal.press(b"\x03")
    terminal.until("Ctrl-C again leaves")
    terminal.press(b"\x1b[A")
    terminal.until("> /undo\n")  # from the history
    terminal.press(b"\x03")


def _narrow(terminal):
    terminal.resize(40, 24)
    terminal.press("/set greedy=on\r")
    terminal.until("greedy=on")
    terminal.press("/system 漢字の名前は日本語です\r")
    terminal.until("> /system 漢字の名前は日本語です", "the conversation starts over")
    terminal.press(f"@'{EXAMPLE}' Describe this image.\r")
    text = terminal.until("tok/s · context 1% of 16,384", "background.", gone="reading")
    assert all(len(line) <= 40 for line in text.splitlines())


WITHOUT_A_MODEL = """
import os, sys
from qwencli.commands.chat_terminal import TerminalLines, quiet_keys
from qwencli.commands.chat_session import ChatSession
from qwencli.config import SamplingOptions
from qwencli.output import Output

class Told(ChatSession):
    def ask(self, text):
        if text == "wait":
            import time
            sys.stderr.write("WAITING\\n"); time.sleep(0.5)
        sys.stderr.write(f"ASKED {text!r}\\n")

sink = Output()
with quiet_keys():
    Told(None, SamplingOptions(), sink, system=None, json=False, stats=False, model="m").converse(
        TerminalLines(sink))
sys.stderr.write("LEFT\\n")
"""


def test_answers_that_go_to_a_file_leave_the_prompt_at_the_terminal(tmp_path):
    script = f"import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 1)\n{WITHOUT_A_MODEL}"
    terminal = Terminal(["-c", script])
    try:
        terminal.until("\n>")
        terminal.press(b"\x1b[200~one\rtwo\x1b[201~ and \x1b[200~three\rfour\x1b[201~\r")
        terminal.until(r"ASKED 'one\ntwo and three\nfour'")
        terminal.press("wait\r")
        terminal.until("WAITING")
        terminal.press("a\rb\r")  # while nobody reads: messages of their own
        terminal.until("ASKED 'a'", "ASKED 'b'")
        terminal.press("half typed\x03next\r")
        terminal.until("ASKED 'next'\n>")
        terminal.press("\x03")
        terminal.until("Ctrl-C again leaves")
        terminal.press("\x03")
        terminal.until("LEFT")
        assert terminal.rest() == 0
    finally:
        terminal.kill()


def test_a_terminal_that_does_not_draw_is_written_on_alone(tmp_path):
    """Such as an editor's; it shows what is typed by its own means."""
    script = WITHOUT_A_MODEL.replace("TerminalLines, quiet_keys", "UndrawnLines, can_draw")
    script = script.replace("with quiet_keys():", "if not can_draw():")
    script = script.replace("TerminalLines(sink)", "UndrawnLines(sink)")
    terminal = Terminal(["-c", f"import os; os.environ['TERM'] = 'dumb'\n{script}"])
    try:
        terminal.until("type a message", "\n>")
        terminal.press("one é\r")
        terminal.until("> one é\n", "ASKED 'one é'")
        terminal.press("/save a b.json\r")
        terminal.until("/save needs one file (put its name in quotes: /save 'a b.json')")
        terminal.press("/edit\r")
        terminal.until("/edit needs the new text")
        terminal.press("half typed\x03")
        terminal.until("Ctrl-C again leaves")
        terminal.press("two\r")
        terminal.until("ASKED 'two'")
        terminal.press("\x03")
        terminal.until("Ctrl-C again leaves, and so does Ctrl-D\n>")
        terminal.press("\x04")
        terminal.until("LEFT")
        assert terminal.rest() == 0
        assert b"\x1b" not in terminal.written
    finally:
        terminal.kill()


def completed(text):
    return [c.text for c in _ChatCompleter().completions(text)]


def test_what_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "c.png", "d.txt", ".e.png", "talk.json", "it's.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "z 1.png").touch()
    assert completed("/re") == ["/retry"]
    assert completed("/set te") == ["temperature="]
    assert completed("/set temperature=") == []
    assert completed("/image ") == ["a\\ b.png", "c.png", "folder/", "it\\'s.jpg"]
    assert completed("/image A") == ["a\\ b.png"]
    assert completed("/image a\\ b") == ["a\\ b.png"]
    assert completed("/image c.png 'a ") == ["a b.png"]
    assert completed("/image folder/z\\ ") == ["z\\ 1.png"]
    assert completed("/image 'folder/z ") == ["folder/z 1.png"]
    assert completed("/load ") == ["folder/", "talk.json"]
    assert completed("look at @c") == ["c.png"]
    assert completed("look at @a\\ ") == ["a\\ b.png"]
    assert completed("me@c") == completed("a word") == completed("/image \0") == []
    assert completed(f"/image {tmp_path}/fol") == ["folder/"]


@pytest.mark.parametrize("columns", [80, 20])
def test_the_question_for_graphics_leaves_nothing_where_it_is_not_understood(columns):
    screen = _Screen(columns, 5)
    pyte.ByteStream(screen).feed(b"> look\r\n" + terminal_pictures._QUESTION.encode())
    assert [line.rstrip() for line in screen.display] == ["> look", "", "", "", ""]


PICTURE = Image.radial_gradient("L").resize((64, 32)).convert("RGB")


def test_pictures_by_each_kind_of_graphics(monkeypatch):
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert render_picture(PICTURE, Graphics.NONE, 80) == ""
    blocks = render_picture(PICTURE, Graphics.HALF_BLOCKS, 21)
    assert [line.count("▀") for line in blocks.splitlines()] == [20] * 5
    kitty = render_picture(PICTURE, Graphics.KITTY, 80)
    assert kitty.startswith("\x1b_Ga=T,f=100,q=2,c=36,r=9,m=") and kitty.endswith("\x1b\\\n")
    iterm = render_picture(PICTURE, Graphics.ITERM, 80)
    assert iterm.startswith("\x1b]1337;File=inline=1;size=") and iterm.endswith("\x07\n")
    assert sixel_pixels(render_picture(PICTURE, Graphics.SIXEL, 80)) == (36 * 8, 9 * 16)
    tall = Image.new("RGB", (1, 5000))
    assert len(render_picture(tall, Graphics.HALF_BLOCKS, 80).splitlines()) == 12


def sixel_pixels(text):
    """(width, height) of the pixels that sixels paint; each of them has a colour."""
    import re

    body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+);(\d+)((?:#\d+;2;\d+;\d+;\d+)+)(.*)\x1b\\\n', text)
    painted = set()
    for top, band in enumerate(body[4].split("-")):
        for line in band.split("$"):
            x = 0
            for length, char in re.findall(r"(?:!(\d+))?([?-~])", re.sub(r"^#\d+", "", line)):
                for _ in range(int(length or 1)):
                    bits = ord(char) - 63
                    painted |= {(x, 6 * top + bit) for bit in range(6) if bits >> bit & 1}
                    x += 1
    width, height = int(body[1]), int(body[2])
    assert len(painted) == width * height
    return width, height
