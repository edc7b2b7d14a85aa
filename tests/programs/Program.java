// Java: a heap that is collected, threads, locks, a timer, a thread pool, a pipe to a child, a socket of its own.
import java.io.*;
import java.net.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.*;

public class Program {
    static final Map<Integer, byte[]> heap = new ConcurrentHashMap<>();
    static final AtomicLong beats = new AtomicLong(), churned = new AtomicLong();
    static int rounds;

    static byte[] block(int n) {
        byte[] b = new byte[16384];
        new Random(n).nextBytes(b);
        return b;
    }

    static void check(boolean right, String what) {
        if (!right) throw new IllegalStateException(what);
    }

    public static void main(String[] args) throws Exception {
        for (int i = 0; i < 2000; i++) heap.put(i, block(i));
        ScheduledExecutorService timer = Executors.newScheduledThreadPool(2);
        timer.scheduleAtFixedRate(beats::incrementAndGet, 10, 10, TimeUnit.MILLISECONDS);
        Thread garbage = new Thread(() -> {
            List<byte[]> kept = new ArrayList<>();
            while (true) {
                kept.add(new byte[1 << 16]);
                if (kept.size() > 100) kept.clear();
                churned.incrementAndGet();
                try { Thread.sleep(1); } catch (InterruptedException e) { return; }
            }
        });
        garbage.setDaemon(true);
        garbage.start();
        ExecutorService pool = Executors.newFixedThreadPool(8);
        ServerSocket server = new ServerSocket(9090, 5, InetAddress.getLoopbackAddress());
        Thread echo = new Thread(() -> {
            try (Socket s = server.accept()) {
                s.getInputStream().transferTo(s.getOutputStream());
            } catch (IOException e) { throw new UncheckedIOException(e); }
        });
        echo.setDaemon(true);
        echo.start();
        Socket client = new Socket(InetAddress.getLoopbackAddress(), 9090);
        Process child = new ProcessBuilder("cat").redirectError(ProcessBuilder.Redirect.INHERIT).start();
        BufferedReader fromChild = child.inputReader(), fromEcho = new BufferedReader(new InputStreamReader(client.getInputStream()));
        BlockingQueue<Boolean> asked = new LinkedBlockingQueue<>();
        sun.misc.Signal.handle(new sun.misc.Signal("USR1"), s -> asked.add(true));
        System.out.println("READY");
        while (asked.take()) {
            try {
                rounds++;
                long b = beats.get(), g = churned.get();
                List<Future<Boolean>> parts = new ArrayList<>();
                for (int i = 0; i < 2000; i++) {
                    int n = i;
                    parts.add(pool.submit(() -> Arrays.equals(heap.get(n), block(n))));
                }
                for (Future<Boolean> p : parts) check(p.get(), "heap");
                client.getOutputStream().write(("round " + rounds + "\n").getBytes());
                check(fromEcho.readLine().equals("round " + rounds), "socket");
                child.getOutputStream().write(("child " + rounds + "\n").getBytes());
                child.getOutputStream().flush();
                check(fromChild.readLine().equals("child " + rounds), "child");
                while (beats.get() == b || churned.get() == g) Thread.sleep(5);
                System.gc();
                System.out.println("OK " + rounds);
            } catch (Exception e) {
                System.out.println("FAIL " + e);
            }
        }
    }
}
